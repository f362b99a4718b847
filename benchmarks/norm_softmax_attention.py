"""How fast is attention with NormSoftmax beside plain attention, and what memory does it take?

python benchmarks/norm_softmax_attention.py [--rounds 9] [--lengths 512 1024 2048 4096] [--eager]
    [--dtype float32]

Both alternate in one process; forward, and forward + backward; without a mask, with padding,
causal, and with a mask that tells rows apart. ``--eager`` adds the definition in plain operations,
which holds all scores. Memory is compared at the longest length.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from effkern.bench import machine
from effkern.bench.results import write_json
from effkern.nn.functional import norm_softmax, norm_softmax_attention

HEADS, FEATURES = 12, 64


def eager(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False
) -> Tensor:
    """All scores, then NormSoftmax, then their product with the values."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return norm_softmax(scores, mask=attn_mask) @ v


def cases(length: int) -> dict[str, dict[str, Any]]:
    """Keywords by name."""
    seen = (torch.arange(length) < 3 * length // 4)[None, None, None]
    rows = torch.rand(1, 1, length, length) > 0.3
    return {
        "full": {},
        "padding": {"attn_mask": seen},
        "causal": {"is_causal": True},
        "mask": {"attn_mask": rows},
    }


def forward(attention: Callable[..., Tensor], qkv: list[Tensor], keywords: dict[str, Any]) -> None:
    """Without a graph."""
    with torch.no_grad():
        attention(*qkv, **keywords)


def both(attention: Callable[..., Tensor], qkv: list[Tensor], keywords: dict[str, Any]) -> None:
    """Forward and backward."""
    leaves = [t.detach().requires_grad_() for t in qkv]
    y = attention(*leaves, **keywords)
    torch.autograd.grad(y, leaves, qkv[0])


def alternate(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return times


def extra_memory(function: Callable[[], None]) -> int:
    """Bytes of memory that the process held at most, beyond those before: PyTorch's tensors, and
    what kernels took for themselves. Linux only.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {name} in /proc/self/status")


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    attentions: dict[str, Callable[..., Tensor]] = {
        "plain": scaled_dot_product_attention,
        "norm_softmax": norm_softmax_attention,
    }
    if options.eager:
        attentions["eager"] = eager
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        dtype = getattr(torch, options.dtype)
        qkv = [torch.randn(1, HEADS, length, FEATURES).to(dtype) for _ in range(3)]
        for case, keywords in cases(length).items():
            for work in (forward, both):
                functions = {
                    name: partial(work, attention, qkv, keywords)
                    for name, attention in attentions.items()
                }
                times = alternate(functions, options.rounds)
                pairs = zip(times["norm_softmax"], times["plain"], strict=True)
                row: dict[str, Any] = {"length": length, "case": case, "work": work.__name__}
                row |= {f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()}
                row["ratio"] = statistics.median(a / b for a, b in pairs)
                if length == max(options.lengths):
                    row["extra_bytes"] = {n: extra_memory(f) for n, f in functions.items()}
                rows.append(row)
                print(row, flush=True)
    suffix = "" if options.dtype == "float32" else f"_{options.dtype}"
    write_json(
        RESULTS / f"norm_softmax_attention{suffix}.json",
        {
            "machine": machine.describe(),
            "dtype": options.dtype,
            "heads": HEADS,
            "features": FEATURES,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
