"""A CRMSNorm stream of d - 1 features: stored d - 1 wide, or d wide with a zero at the end?

python benchmarks/crmsnorm_width.py   prints a table of docs/convert.md; results/crmsnorm_width.json
Ratios are medians over several allocations of the operands, with the least and the largest, of
medians of alternating runs in one process, on two threads: where operands lie in memory matters.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch
from common import RESULTS
from torch import Tensor
from torch.nn import functional as F

from effkern.nn.functional import crms_norm

#: rows and d: ViT-S / 16 and GPT-2 small, one sequence and eight
SHAPES = {
    "ViT-S, 1 image": (197, 384),
    "ViT-S, 8 images": (8 * 197, 384),
    "GPT-2 small, 128 tokens": (128, 768),
    "GPT-2 small, 1024 tokens": (1024, 768),
}
ALLOCATIONS, SECONDS = 5, 1.0


def work(rows: int, d: int, width: int) -> dict[str, Callable[[], Tensor]]:
    """The operations of a block's second half on a stream that is stored so wide."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, hidden = noise(rows, width), noise(rows, 4 * d)
    up, down = noise(4 * d, width), noise(width, 4 * d)
    of_up, of_down = noise(4 * d), noise(width)

    def half() -> Tensor:
        y = F.gelu(F.linear(crms_norm(x, None, 1e-5), up, of_up))
        return x + F.linear(y, down, of_down)

    return {
        "norm": lambda: crms_norm(x, None, 1e-5),
        "reader": lambda: F.linear(x, up, of_up),
        "writer": lambda: F.linear(hidden, down, of_down),
        "half a block": half,
    }


def medians(functions: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Seconds of each, run in turn."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    rows = []
    names = ("norm", "reader", "writer", "half a block")
    for shape, (count, d) in SHAPES.items():
        ratios: dict[str, list[float]] = {name: [] for name in names}
        kept = []
        for _ in range(ALLOCATIONS):
            both = {
                f"{name} {width}": function
                for width in (d - 1, d)
                for name, function in work(count, d, width).items()
            }
            kept.append(both)  # so that the next operands lie elsewhere
            found = medians(both)
            for name in names:
                ratios[name].append(found[f"{name} {d - 1}"] / found[f"{name} {d}"])
        rows.append({"shape": shape, "d": d, "ratios": ratios})
        cells = [
            f"{statistics.median(ratios[n]):.2f} ({min(ratios[n]):.2f}-{max(ratios[n]):.2f})"
            for n in names
        ]
        print(f"| {shape} | {d - 1} / {d} | {' | '.join(cells)} |", flush=True)
    (RESULTS / "crmsnorm_width.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
