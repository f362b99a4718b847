"""How fast are RMSNorm, LayerNorm and CRMSNorm over rows, beside the strongest peers?

python benchmarks/norms.py [SIZE ...]   measures; results/norms_SIZE.json. SIZE: features of a row, or
                                        1576x384: so many rows, and features
python benchmarks/norms.py --table      prints the tables of docs/measured.md
"""

import json
import sys
from typing import Any

from common import RESULTS, run_as

#: At last eight images of ViT-S/16.
SIZES = ("256", "512", "768", "1024", "2048", "4096", "8192", "1576x384")

#: The size of which everything is measured. With the others neither torch.compile, which takes
#: minutes, nor a fresh allocator takes part.
WHOLE = "768"

#: What is tabled of sizes and allocators beside that one and the warm one.
BOTH = "forward + backward"

ROUNDS = 9

#: Beside which peers each norm's speed-ups are tabled.
PEERS = {
    "RMSNorm": ("torch rms_norm", "torch.compile", "torch layer_norm"),
    "LayerNorm": ("torch layer_norm", "torch.compile"),
    "CRMSNorm": ("eager crms_norm", "torch.compile", "torch layer_norm"),
}


def measure(sizes: list[str]) -> None:
    for size in sizes:
        rows, _, features = size.rpartition("x")
        what = ["--hidden-size", features, "--rounds", str(ROUNDS)]
        if rows:
            what += ["--rows", rows]
        if size != WHOLE:
            what += ["--no-fresh", "--no-overhead", "--no-compile"]
        failed = run_as("norms", f"norms_{size}", what)
        if failed:
            sys.exit(failed)


def print_tables() -> None:
    cases = []
    for size in SIZES:
        file = RESULTS / f"norms_{size}.json"
        if file.exists():
            for case in json.loads(file.read_text())["cases"]:
                in_full = size in (WHOLE, SIZES[-1]) and "fresh" not in case["name"]
                if in_full or BOTH in case["name"]:
                    cases.append(case)
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
        measure(sys.argv[1:] or list(SIZES))
