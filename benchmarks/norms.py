"""How fast are RMSNorm, LayerNorm and CRMSNorm over rows, beside the strongest peers?

python benchmarks/norms.py [HIDDEN_SIZE ...]   measures; results/norms_HIDDEN_SIZE.json
python benchmarks/norms.py --table             prints the tables of docs/measured.md
"""

import json
import sys
from typing import Any

from common import RESULTS, run_as

SIZES = (256, 512, 768, 1024, 2048, 4096, 8192)

#: Beside which peers each norm's speed-ups are tabled.
PEERS = {
    "RMSNorm": ("torch rms_norm", "torch.compile", "torch layer_norm"),
    "LayerNorm": ("torch layer_norm", "torch.compile"),
    "CRMSNorm": ("eager crms_norm", "torch.compile", "torch layer_norm"),
}


def measure(sizes: list[str]) -> None:
    for size in sizes:
        # Of one size everything; of the others what a network in its stride meets.
        less = [] if size == "768" else ["--no-fresh", "--no-overhead"]
        failed = run_as("norms", f"norms_{size}", ["--hidden-size", size, *less])
        if failed:
            sys.exit(failed)


def print_tables() -> None:
    cases = []
    for size in SIZES:
        file = RESULTS / f"norms_{size}.json"
        if file.exists():
            cases += json.loads(file.read_text())["cases"]
    for title, peers in PEERS.items():
        print(f"\n| {title} | of the copy limit | {' | '.join(peers)} |")
        print("|---" * (2 + len(peers)) + "|")
        for case in cases:
            if case["name"].startswith(f"{title} ") and case["bytes_moved"]:
                print(as_row(case, title, peers))


def as_row(case: dict[str, Any], title: str, peers: tuple[str, ...]) -> str:
    rows = {row["name"]: row for row in case["rows"]}
    what = case["name"].removeprefix(f"{title} ").replace(" float32", "")
    what = what.removesuffix(", warm allocator").replace(" allocator", "")
    ratios = [
        "{median:.2f} ({low:.2f} to {high:.2f})".format(**rows[peer]["speedup"])
        if peer in rows
        else "-"
        for peer in peers
    ]
    share = rows["effkern"]["share_of_limit"]["median"]
    return f"| {what} | {share:.0%} | {' | '.join(ratios)} |"


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print_tables()
    else:
        measure(sys.argv[1:] or [str(size) for size in SIZES])
