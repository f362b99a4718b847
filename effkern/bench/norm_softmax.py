"""``effkern bench norm_softmax``: NormSoftmax and its cross-entropy, beside torch's softmax, which
does less, and beside NormSoftmax in plain PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.bench import machine
from effkern.bench.demo.memory import peak_of
from effkern.bench.limits import Streams, copy_limit, moved_bytes
from effkern.bench.memory import allocators
from effkern.bench.progress import Report, counter, silent
from effkern.bench.results import COPY_LIMIT, OURS, Case, Result, make_rows
from effkern.bench.timers import Contestant, Rotation, alternate, clock_for
from effkern.nn import functional

WARM_UP = 2

#: What is timed, and the passes over tensors of x's size that it cannot do without: forward reads x
#: and writes y; backward reads x and the gradient and writes x's gradient.
MODES: dict[str, tuple[Streams, ...]] = {
    "forward": (Streams(1, 1),),
    "forward + backward": (Streams(1, 1), Streams(2, 1)),
}


@dataclass(frozen=True)
class NormSoftmaxSettings:
    """What to measure.

    Attributes:
        device: where the tensors are.
        shape: of the softmax's input, the last dimension the distributions'; none to leave it out.
        tokens: rows of the cross-entropy's logits; 0 to leave it out.
        classes: their columns.
        dtype: of all tensors, by torch's name.
        rounds: timed rounds for each case.
        compile: whether torch.compile of the plain formula takes part.
        seed: of all tensors.
    """

    device: str = "cpu"
    shape: Sequence[int] = (96, 512, 512)
    tokens: int = 4096
    classes: int = 50257
    dtype: str = "float32"
    rounds: int = 11
    compile: bool = True
    seed: int = 0


def run(settings: NormSoftmaxSettings, report: Report = silent) -> Result:
    """Measure the softmax, then the cross-entropy and the memory that each form of it takes."""
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    torch.manual_seed(settings.seed)
    cases: list[Case] = []
    notes = [
        "warm allocator: a call finds the memory that earlier calls freed; fresh: it finds none",
        "torch softmax and torch cross_entropy are those of plain softmax: they do less",
    ]
    if settings.shape:
        cases += _softmax_cases(settings, device, dtype, report)
    if settings.tokens:
        case, memory = _cross_entropy_case(settings, device, dtype, report)
        cases.append(case)
        notes += memory
    return Result(
        "norm_softmax", dataclasses.asdict(settings), machine.describe(), cases, {}, notes
    )


def plain(x: Tensor) -> Tensor:
    """NormSoftmax as a user writes it."""
    sigma = x.std(-1, correction=0, keepdim=True)
    return torch.softmax(x / sigma.clamp(max=1.0).clamp(min=1e-6), -1)


def plain_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of NormSoftmax as a user writes it."""
    sigma = logits.std(-1, correction=0, keepdim=True)
    return F.cross_entropy(logits / sigma.clamp(max=1.0).clamp(min=1e-6), target)


def _softmax_cases(
    settings: NormSoftmaxSettings, device: torch.device, dtype: torch.dtype, report: Report
) -> list[Case]:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: functional.norm_softmax,
        "torch softmax": lambda x: torch.softmax(x, -1),
        "plain NormSoftmax": plain,
    }
    if settings.compile:
        torch.compiler.reset()
        functions["torch.compile of it"] = torch.compile(plain)
    x = torch.empty(*settings.shape, dtype=dtype, device=device)
    rotation = Rotation(
        lambda: (torch.randn_like(x).requires_grad_(), torch.randn_like(x)), set_bytes=2 * x.nbytes
    )
    cases = []
    for mode, passes in MODES.items():
        moved = moved_bytes(passes, x.nbytes)
        limit = copy_limit(passes, buffer_bytes=x.nbytes, device=device)
        timed = _forward if mode == "forward" else _both

        def contestant(function: Any, timed: Any = timed) -> Contestant:
            return Contestant(lambda buffers: timed(function, *buffers), rotation)

        contestants = {name: contestant(function) for name, function in functions.items()}
        contestants[COPY_LIMIT] = limit.contestant
        for allocator, between in allocators(device).items():
            size = " x ".join(map(str, settings.shape))
            name = f"NormSoftmax {size} {settings.dtype}, {mode}, {allocator} allocator"
            times = alternate(
                contestants,
                rounds=settings.rounds,
                warm_up=WARM_UP,
                clock=clock_for(device),
                between=between,
                on_round=counter(report, name, WARM_UP + settings.rounds),
            )
            rows = make_rows(times, bytes_moved=moved, limit_bytes=limit.bytes_moved)
            cases.append(Case(name, rows, moved, x.numel(), limit.streams))
    return cases


def _forward(function: Callable[[Tensor], Tensor], x: Tensor, _: Tensor) -> Tensor:
    with torch.no_grad():
        return function(x)


def _both(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    y = function(x)
    # The output stays until the clock has stopped, as a network keeps it.
    return y, *torch.autograd.grad(y, x, grad)


def _cross_entropy_case(
    settings: NormSoftmaxSettings, device: torch.device, dtype: torch.dtype, report: Report
) -> tuple[Case, list[str]]:
    """Forward and backward together: what a training step makes of a loss."""
    functions: Mapping[str, Callable[..., Tensor]] = {
        OURS: functional.norm_softmax_cross_entropy,
        "effkern, inplace": lambda *call: functional.norm_softmax_cross_entropy(
            *call, inplace=True
        ),
        "torch cross_entropy": F.cross_entropy,
        "plain NormSoftmax": plain_cross_entropy,
    }
    logits = torch.randn(settings.tokens, settings.classes, device=device).to(dtype)
    target = torch.randint(settings.classes, (settings.tokens,), device=device)

    def prepare() -> Tensor:
        return logits.normal_().detach().requires_grad_()  # the same memory for everyone

    def step(function: Callable[..., Tensor], leaf: Tensor) -> tuple[Tensor, ...]:
        loss = function(leaf.view_as(leaf), target)  # what is overwritten must be no leaf
        return loss, *torch.autograd.grad(loss, leaf)

    def contestant(function: Callable[..., Tensor]) -> Contestant:
        return Contestant(lambda x: step(function, x), prepare)

    # The logits are read and their gradient is written, if each is done once.
    passes = (Streams(1, 1),)
    limit = copy_limit(passes, buffer_bytes=logits.nbytes, device=device)
    contestants = {name: contestant(function) for name, function in functions.items()}
    contestants[COPY_LIMIT] = limit.contestant
    name = f"cross-entropy {settings.tokens} x {settings.classes} {settings.dtype}, fwd + bwd"
    times = alternate(
        contestants,
        rounds=settings.rounds,
        warm_up=1,
        clock=clock_for(device),
        on_round=counter(report, name, 1 + settings.rounds),
    )
    moved = moved_bytes(passes, logits.nbytes)
    rows = make_rows(times, bytes_moved=moved, limit_bytes=limit.bytes_moved)
    memory = []
    for each, function in functions.items():
        peak = peak_of(partial(contestant(function).run, prepare()), device)
        memory.append(
            f"{each}: beside the logits it takes {peak / logits.nbytes:.2f} times their memory"
        )
    return Case(name, rows, moved, logits.numel(), limit.streams), memory
