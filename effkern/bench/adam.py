"""``effkern bench adam``: one AdamW step over many tensors, beside those of others.

`Work` and `measure` know no rule: `effkern.bench.optimizers` measures every other one with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

import effkern
from effkern.bench import machine
from effkern.bench.limits import Streams, copy_limit, moved_bytes
from effkern.bench.peers import ADAMW, MakeStep, Peers, adamw_peers
from effkern.bench.progress import Report, counter, silent
from effkern.bench.results import COPY_LIMIT, OURS, Case, Result, make_rows
from effkern.bench.timers import Contestant, Scrubber, alternate, clock_for

#: A step reads parameter, gradient and both moments, and writes all but the gradient.
STREAMS = Streams(reads=4, writes=3, in_place=True)

#: Of each stream of the copy limit: far beyond any cache, and it leaves room for the contestants.
LIMIT_BYTES = 128 * 2**20

WARM_UP = 3


def gpt2_small_shapes() -> list[tuple[int, ...]]:
    """The 148 parameter tensors of GPT-2 small, 124,439,808 elements."""
    hidden = 768
    block = [
        (hidden,), (hidden,), (hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,),
        (hidden,), (hidden,), (hidden, 4 * hidden), (4 * hidden,), (4 * hidden, hidden), (hidden,),
    ]  # fmt: skip
    return [(50257, hidden), (1024, hidden), *block * 12, (hidden,), (hidden,)]


def many_small_shapes() -> list[tuple[int, ...]]:
    """2,500 vectors as biases and norms have them, 2,208,000 elements."""
    return [(64,), (256,), (768,), (1024,), (2304,)] * 500


#: The sets of tensors that can be asked for: the name for a table, and the shapes.
TENSOR_SETS: dict[str, tuple[str, Callable[[], list[tuple[int, ...]]]]] = {
    "gpt2": ("GPT-2 small", gpt2_small_shapes),
    "small": ("many small tensors", many_small_shapes),
}


class StepSettings(Protocol):
    """What `measure` asks of settings."""

    @property
    def device(self) -> str:
        """Where the tensors are."""

    @property
    def dtype(self) -> str:
        """Of parameters and gradients, by torch's name."""

    @property
    def rounds(self) -> int:
        """Timed rounds."""

    @property
    def seed(self) -> int:
        """Of the parameters and gradients."""


@dataclass(frozen=True)
class AdamSettings:
    """What to measure.

    Attributes:
        device: where the tensors are.
        tensors: names from `TENSOR_SETS`.
        dtype: of parameters, gradients and state, by torch's name.
        rounds: timed rounds for each set.
        compile: whether torch.compile of torch's step takes part; compiling 2,500 tensors takes
            minutes.
        seed: of the parameters and gradients.
    """

    device: str = "cpu"
    tensors: Sequence[str] = ("gpt2", "small")
    dtype: str = "float32"
    rounds: int = 20
    compile: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Work:
    """One step of an optimizer, and who takes it.

    Attributes:
        title: what the step is.
        ours: effkern's step.
        peers: those of others, each a `MakeStep`.
        passes: over memory, for the copy limit.
        bytes_an_element: that a step must read and write.
        rewriting: the peers that change their gradients. Each gets gradients of its own, and they
            are restored before each step, outside of the timed part.
        other_work: the peers whose step does other work than the case's, which have no bandwidth.
    """

    title: str
    ours: MakeStep
    peers: Peers
    passes: Sequence[Streams]
    bytes_an_element: int
    rewriting: frozenset[str] = frozenset()
    other_work: frozenset[str] = frozenset()


def run(settings: AdamSettings, report: Report = silent) -> Result:
    """Measure every set of tensors."""
    work = Work(
        "AdamW",
        _effkern_adamw,
        adamw_peers(torch.device(settings.device), compiled=settings.compile),
        [STREAMS],
        moved_bytes([STREAMS], getattr(torch, settings.dtype).itemsize),
    )
    cases = [measure(work, name, settings, report) for name in settings.tensors]
    return Result(
        "adam",
        dataclasses.asdict(settings),
        machine.describe(),
        cases,
        left_out=work.peers.left_out,
    )


def measure(work: Work, tensors: str, settings: StepSettings, report: Report = silent) -> Case:
    """One set of tensors; each contestant has its own, but all share the gradients.

    Peers that fail on their first step are moved to ``work.peers.left_out``.
    """
    set_name, shapes_of = TENSOR_SETS[tensors]
    shapes = shapes_of()
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    generator = torch.Generator(device=device).manual_seed(settings.seed)

    def random_tensors() -> list[Tensor]:
        return [
            torch.randn(s, generator=generator, dtype=dtype, device=device) * 0.02 for s in shapes
        ]

    gradients = random_tensors()
    elements = sum(prod(shape) for shape in shapes)
    limit = copy_limit(work.passes, buffer_bytes=LIMIT_BYTES, device=device)

    contestants = {OURS: _contestant(work.ours, random_tensors(), gradients)}
    for name, make_step in list(work.peers.found.items()):
        try:
            contestants[name] = _contestant(
                make_step, random_tensors(), gradients, rewrites=name in work.rewriting
            )
        except Exception as error:  # no compiler, a package that does not fit this machine
            work.peers.leave_out(name, error)
    contestants[COPY_LIMIT] = limit.contestant

    name = (
        f"{work.title}, {set_name}: {len(shapes)} tensors, {elements / 1e6:.1f} M elements, "
        f"{settings.dtype}"
    )
    times = alternate(
        contestants,
        rounds=settings.rounds,
        warm_up=WARM_UP,
        clock=clock_for(device),
        between=Scrubber(device).scrub,
        on_round=counter(report, name, WARM_UP + settings.rounds),
    )
    moved = work.bytes_an_element * elements
    rows = [
        replace(row, bandwidth=None, share_of_limit=None) if row.name in work.other_work else row
        for row in make_rows(times, bytes_moved=moved, limit_bytes=limit.bytes_moved)
    ]
    return Case(name, rows, moved, elements, limit.streams)


def _effkern_adamw(parameters: list[nn.Parameter]) -> Callable[[], object]:
    return effkern.FusedAdamW(parameters, **ADAMW).step


def _contestant(
    make_step: MakeStep, values: list[Tensor], gradients: list[Tensor], *, rewrites: bool = False
) -> Contestant:
    parameters = [nn.Parameter(value) for value in values]
    own = [gradient.clone() for gradient in gradients] if rewrites else gradients
    for parameter, gradient in zip(parameters, own, strict=True):
        parameter.grad = gradient
    step = make_step(parameters)
    step()  # makes the state, and compiles; a peer that cannot fails here
    if not rewrites:
        return Contestant(lambda _: step())
    return Contestant(lambda _: step(), lambda: torch._foreach_copy_(own, gradients))
