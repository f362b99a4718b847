"""``effkern bench rms_norm``: RMSNorm over rows, with and without a residual, beside others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effkern.bench import call_overhead, machine
from effkern.bench.limits import CopyLimit, Streams, copy_limit
from effkern.bench.memory import release_free_memory
from effkern.bench.peers import EPS, Norm, Peers, norm_peers
from effkern.bench.progress import Report, counter, silent
from effkern.bench.results import COPY_LIMIT, OURS, Case, Result, make_rows
from effkern.bench.timers import Contestant, Rotation, alternate, clock_for
from effkern.nn import functional

WARM_UP = 3

#: What a call may do, and the passes over row-sized buffers that it cannot do without, by whether
#: there is a residual. Forward reads x (and the residual) and writes y (and the sum); backward
#: reads the gradient (and that of the sum) and the normalised input, and writes the input's
#: gradient, which the residual shares.
MODES: dict[str, dict[bool, tuple[Streams, ...]]] = {
    "forward": {False: (Streams(1, 1),), True: (Streams(2, 2),)},
    "backward": {False: (Streams(2, 1),), True: (Streams(3, 1),)},
    "forward + backward": {
        False: (Streams(1, 1), Streams(2, 1)),
        True: (Streams(2, 2), Streams(3, 1)),
    },
}

#: Warm: a call finds the memory that earlier calls freed. Fresh: it finds none, as in a program's
#: first step.
ALLOCATORS = ("warm", "fresh")


@dataclass(frozen=True)
class RmsNormSettings:
    """What to measure.

    Attributes:
        device: where the tensors are.
        rows: of every input.
        hidden_sizes: features of a row, one group of cases each.
        dtype: of inputs and weight, by torch's name.
        rounds: timed rounds for each case.
        compile: whether torch.compile of torch's norm takes part.
        seed: of inputs, weight and gradients.
    """

    device: str = "cpu"
    rows: int = 8192
    hidden_sizes: Sequence[int] = (768,)
    dtype: str = "float32"
    rounds: int = 15
    compile: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Buffers:
    """One call's inputs and incoming gradients, each (rows, features); two more with a residual."""

    x: Tensor
    residual: Tensor | None
    grads: tuple[Tensor, ...]


def run(settings: RmsNormSettings, report: Report = silent) -> Result:
    """Measure every hidden size, then what a call on a tiny input costs."""
    device = torch.device(settings.device)
    cases: list[Case] = []
    notes: list[str] = []
    left_out: dict[str, str] = {}
    for hidden_size in settings.hidden_sizes:
        for with_residual in (False, True):
            torch.compiler.reset()
            peers = norm_peers(device, compiled=settings.compile)
            cases += _measure_shape(hidden_size, with_residual, peers, settings, report)
            left_out |= peers.left_out
    if not release_free_memory(device):
        notes.append("fresh allocator: not measured, this system's keeps the memory it has")
    cases += call_overhead.measure(device, seed=settings.seed, report=report)
    return Result(
        "rms_norm", dataclasses.asdict(settings), machine.describe(), cases, left_out, notes
    )


def effkern_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    """Effkern's contestant."""
    if residual is None:
        return (functional.rms_norm(x, weight.shape, weight, EPS),)
    return functional.rms_norm(x, weight.shape, weight, EPS, residual=residual)


def _measure_shape(
    hidden_size: int, with_residual: bool, peers: Peers, settings: RmsNormSettings, report: Report
) -> list[Case]:
    """Every mode and allocator for one shape; peers that fail are left out."""
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    generator = torch.Generator(device=device).manual_seed(settings.seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    def make() -> Buffers:
        x, *more = (tensor(settings.rows, hidden_size) for _ in range(4 if with_residual else 2))
        x.requires_grad_()
        if not with_residual:
            return Buffers(x, None, tuple(more))
        return Buffers(x, more[0].requires_grad_(), tuple(more[1:]))

    weight = tensor(hidden_size).requires_grad_()
    row_bytes = settings.rows * hidden_size * dtype.itemsize
    rotation = Rotation(make, set_bytes=row_bytes * (4 if with_residual else 2))
    norms = {OURS: effkern_norm, **_working(peers, weight, rotation)}
    allocators = ALLOCATORS if release_free_memory(device) else ALLOCATORS[:1]
    shape = f"RMSNorm {settings.rows} x {hidden_size} {settings.dtype}" + (
        " + residual" if with_residual else ""
    )

    measured = []
    for mode, passes in MODES.items():
        limit = copy_limit(passes[with_residual], buffer_bytes=row_bytes, device=device)
        for allocator in allocators:
            name = f"{shape}, {mode}, {allocator} allocator"
            case = _measure_case(
                name, mode, norms, weight, rotation, limit, settings, report, allocator == "fresh"
            )
            measured.append(case)
    return measured


def _working(peers: Peers, weight: Tensor, rotation: Callable[[], Buffers]) -> dict[str, Norm]:
    """The peers that get through a forward and a backward pass here; compiles what compiles."""
    for name, norm in list(peers.found.items()):
        try:
            for mode in MODES:
                contestant = _contestant(mode, norm, weight, rotation)
                contestant.run(contestant.prepare())
        except (
            Exception
        ) as error:  # a compiler that is missing, a package that does not fit this machine
            peers.leave_out(name, error)
    return peers.found


def _measure_case(
    name: str,
    mode: str,
    norms: Mapping[str, Norm],
    weight: Tensor,
    rotation: Callable[[], Buffers],
    limit: CopyLimit,
    settings: RmsNormSettings,
    report: Report,
    fresh: bool,
) -> Case:
    device = weight.device
    contestants = {key: _contestant(mode, norm, weight, rotation) for key, norm in norms.items()}
    contestants[COPY_LIMIT] = limit.contestant
    times = alternate(
        contestants,
        rounds=settings.rounds,
        warm_up=WARM_UP,
        clock=clock_for(device),
        between=(lambda: release_free_memory(device)) if fresh else None,
        on_round=counter(report, name, WARM_UP + settings.rounds),
    )
    rows = make_rows(times, bytes_moved=limit.bytes_moved, limit_bytes=limit.bytes_moved)
    elements = settings.rows * weight.numel()
    return Case(name, rows, limit.bytes_moved, elements, limit.streams)


def _contestant(
    mode: str, norm: Norm, weight: Tensor, rotation: Callable[[], Buffers]
) -> Contestant:
    def forward(buffers: Buffers) -> tuple[Tensor, ...]:
        return norm(buffers.x, weight, buffers.residual)

    def forward_only(buffers: Buffers) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return forward(buffers)

    def backward(graph: tuple[Buffers, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        buffers, outputs = graph
        inputs = (
            [buffers.x, weight]
            if buffers.residual is None
            else [buffers.x, weight, buffers.residual]
        )
        return torch.autograd.grad(outputs, inputs, buffers.grads)

    def both(buffers: Buffers) -> tuple[Tensor, ...]:
        outputs = forward(buffers)
        return outputs + backward((buffers, outputs))

    def forward_untimed() -> tuple[Buffers, tuple[Tensor, ...]]:
        buffers = rotation()
        return buffers, forward(buffers)

    if mode == "forward":
        return Contestant(forward_only, rotation)
    if mode == "backward":
        return Contestant(backward, forward_untimed)
    return Contestant(both, rotation)
