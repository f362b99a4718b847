"""A CRMSNorm stream of d - 1 features: stored d - 1 wide, or d wide with a zero at the end?

python benchmarks/crmsnorm_width.py   prints a table of docs/convert.md; results/crmsnorm_width.json
Times are medians of alternating runs in one process, on two threads.
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
SECONDS = 5.0


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
    for shape, (count, d) in SHAPES.items():
        both = {
            f"{name} {width}": function
            for width in (d - 1, d)
            for name, function in work(count, d, width).items()
        }
        found = medians(both)
        row = {"shape": shape, "d": d}
        for name in ("norm", "reader", "writer", "half a block"):
            row[name] = found[f"{name} {d - 1}"] / found[f"{name} {d}"]
            row[f"{name}, seconds"] = found[f"{name} {d}"]
        rows.append(row)
        ratios = " | ".join(f"{row[n]:.2f}" for n in ("norm", "reader", "writer", "half a block"))
        print(f"| {shape} | {d - 1} / {d} | {ratios} |", flush=True)
    (RESULTS / "crmsnorm_width.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
