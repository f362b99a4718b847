"""``effkern bench norms``: RMSNorm, LayerNorm and CRMSNorm over rows, with and without a residual,
beside others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkern.bench import call_overhead, machine, memory
from effkern.bench.limits import copy_limit, moved_bytes
from effkern.bench.norm_work import MODES, NormWork
from effkern.bench.peers import EPS, Norm, Peers, norm_peers
from effkern.bench.progress import Report, counter, silent
from effkern.bench.results import COPY_LIMIT, OURS, Case, Result, make_rows
from effkern.bench.timers import alternate, clock_for
from effkern.nn import functional

WARM_UP = 3

#: Elements of an input where nobody says how many rows: 8192 rows of 768 features.
ELEMENTS = 8192 * 768


@dataclass(frozen=True)
class Contender:
    """Effkern's side of one norm.

    Attributes:
        title: as people call it.
        parameters: how many tensors of parameters it takes.
        function: a `Norm`.
    """

    title: str
    parameters: int
    function: Norm


def _over_the_last(function: Callable[..., Any]) -> Norm:
    """A `Norm` from a function that is told which dimensions to normalise."""

    def run(
        x: Tensor, parameters: tuple[Tensor, ...], residual: Tensor | None
    ) -> tuple[Tensor, ...]:
        if residual is None:
            return (function(x, x.shape[-1:], *parameters, EPS),)
        return function(x, x.shape[-1:], *parameters, EPS, residual=residual)  # type: ignore[no-any-return]

    return run


NORMS = {
    "rms_norm": Contender("RMSNorm", 1, _over_the_last(functional.rms_norm)),
    "layer_norm": Contender("LayerNorm", 2, _over_the_last(functional.layer_norm)),
    "crms_norm": Contender(
        "CRMSNorm",
        1,
        _over_the_last(lambda x, _, *rest, **how: functional.crms_norm(x, *rest, **how)),
    ),
}


@dataclass(frozen=True)
class NormsSettings:
    """What to measure.

    Attributes:
        device: where the tensors are.
        norms: of `NORMS`.
        rows: of every input; None for so many that an input has about `ELEMENTS` elements.
        hidden_sizes: features of a row, one group of cases each.
        dtype: of inputs and parameters, by torch's name.
        rounds: timed rounds for each case.
        compile: whether torch.compile of the eager formula takes part.
        fresh: whether each case is also measured where a call finds no memory that was freed.
        overhead: whether to measure what a call on a tiny input costs.
        seed: of inputs, parameters and gradients.
    """

    device: str = "cpu"
    norms: Sequence[str] = tuple(NORMS)
    rows: int | None = None
    hidden_sizes: Sequence[int] = (768,)
    dtype: str = "float32"
    rounds: int = 15
    compile: bool = True
    fresh: bool = True
    overhead: bool = True
    seed: int = 0


def run(settings: NormsSettings, report: Report = silent) -> Result:
    """Measure every norm at every hidden size, then what a call on a tiny input costs."""
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    allocators = memory.allocators(device, fresh=settings.fresh)
    cases: list[Case] = []
    left_out: dict[str, str] = {}
    for hidden_size in settings.hidden_sizes:
        for name in settings.norms:
            for with_residual in (False, True):
                torch.compiler.reset()  # or the shapes before count against its limit
                peers = norm_peers(name, device, compiled=settings.compile)
                ours = NORMS[name]
                work = NormWork(
                    settings.rows or max(1, ELEMENTS // hidden_size),
                    hidden_size,
                    dtype,
                    device,
                    parameters=ours.parameters,
                    with_residual=with_residual,
                    seed=settings.seed,
                )
                norms = {OURS: ours.function, **_working(peers, work)}
                cases += _measure(ours.title, work, norms, settings.rounds, allocators, report)
                left_out |= peers.left_out
    if settings.overhead:
        cases += call_overhead.measure(device, seed=settings.seed, report=report)
    return Result(
        "norms",
        dataclasses.asdict(settings),
        machine.describe(),
        cases,
        left_out,
        notes=[
            "warm allocator: a call finds the memory that earlier calls freed; fresh: it finds none"
            + (" (not measured here)" if len(allocators) == 1 else ""),
            *(
                ["calls are queued ahead of the GPU: the times are its own"]
                if device.type == "cuda"
                else []
            ),
        ],
    )


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


def _measure(
    title: str,
    work: NormWork,
    norms: Mapping[str, Norm],
    rounds: int,
    allocators: Mapping[str, Callable[[], object] | None],
    report: Report,
) -> list[Case]:
    """Every mode with every allocator."""
    dtype = str(work.dtype).removeprefix("torch.")
    shape = f"{title} {work.rows} x {work.hidden_size} {dtype}"
    if work.with_residual:
        shape += " + residual"
    cases = []
    for mode in MODES:
        passes = work.passes(mode)
        moved = moved_bytes(passes, work.buffer_bytes)
        limit = copy_limit(passes, buffer_bytes=work.buffer_bytes, device=work.device)
        contestants = {name: work.contestant(mode, norm) for name, norm in norms.items()}
        contestants[COPY_LIMIT] = limit.contestant
        for allocator, between in allocators.items():
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
