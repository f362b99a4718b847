"""``effkern bench rms_norm``: RMSNorm over rows, with and without a residual, beside others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effkern.bench import call_overhead, machine
from effkern.bench.limits import copy_limit, moved_bytes
from effkern.bench.memory import allocators
from effkern.bench.norm_work import MODES, NormWork
from effkern.bench.peers import EPS, Norm, Peers, norm_peers
from effkern.bench.progress import Report, counter, silent
from effkern.bench.results import COPY_LIMIT, OURS, Case, Result, make_rows
from effkern.bench.timers import alternate, clock_for
from effkern.nn import functional

WARM_UP = 3


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


def run(settings: RmsNormSettings, report: Report = silent) -> Result:
    """Measure every hidden size, then what a call on a tiny input costs."""
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    cases: list[Case] = []
    left_out: dict[str, str] = {}
    for hidden_size in settings.hidden_sizes:
        for with_residual in (False, True):
            torch.compiler.reset()  # or the shapes before count against its limit of recompilations
            peers = norm_peers(device, compiled=settings.compile)
            work = NormWork(
                settings.rows,
                hidden_size,
                dtype,
                device,
                with_residual=with_residual,
                seed=settings.seed,
            )
            norms = {OURS: effkern_norm, **_working(peers, work)}
            cases += _measure(work, norms, settings.rounds, report)
            left_out |= peers.left_out
    cases += call_overhead.measure(device, seed=settings.seed, report=report)
    return Result(
        "rms_norm",
        dataclasses.asdict(settings),
        machine.describe(),
        cases,
        left_out,
        notes=[
            "warm allocator: a call finds the memory that earlier calls freed; fresh: it finds none"
            + (" (not measured here)" if len(allocators(device)) == 1 else "")
        ],
    )


def effkern_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    """The contestant that the others are compared with, a `Norm`."""
    if residual is None:
        return (functional.rms_norm(x, weight.shape, weight, EPS),)
    return functional.rms_norm(x, weight.shape, weight, EPS, residual=residual)


def _working(peers: Peers, work: NormWork) -> dict[str, Norm]:
    """The peers that get through every mode here; compiles what compiles."""
    for name, norm in list(peers.found.items()):
        try:
            for mode in MODES:
                contestant = work.contestant(mode, norm)
                contestant.run(contestant.prepare())
        except Exception as error:  # no compiler, a package that does not fit this machine
            peers.leave_out(name, error)
    return peers.found


def _measure(work: NormWork, norms: Mapping[str, Norm], rounds: int, report: Report) -> list[Case]:
    """Every mode with every allocator."""
    dtype = str(work.dtype).removeprefix("torch.")
    shape = f"RMSNorm {work.rows} x {work.hidden_size} {dtype}"
    if work.with_residual:
        shape += " + residual"
    cases = []
    for mode in MODES:
        passes = work.passes(mode)
        moved = moved_bytes(passes, work.buffer_bytes)
        limit = copy_limit(passes, buffer_bytes=work.buffer_bytes, device=work.device)
        contestants = {name: work.contestant(mode, norm) for name, norm in norms.items()}
        contestants[COPY_LIMIT] = limit.contestant
        for allocator, between in allocators(work.device).items():
            name = f"{shape}, {mode}, {allocator} allocator"
            times = alternate(
                contestants,
                rounds=rounds,
                warm_up=WARM_UP,
                clock=clock_for(work.device),
                between=between,
                on_round=counter(report, name, WARM_UP + rounds),
            )
            rows = make_rows(times, bytes_moved=moved, limit_bytes=limit.bytes_moved)
            cases.append(Case(name, rows, moved, work.elements, limit.streams))
    return cases
