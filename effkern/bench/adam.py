"""``effkern bench adam``: one AdamW step over many tensors, beside those of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

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


def run(settings: AdamSettings, report: Report = silent) -> Result:
    """Measure every set of tensors."""
    peers = adamw_peers(torch.device(settings.device), compiled=settings.compile)
    cases = []
    for name in settings.tensors:
        title, shapes = TENSOR_SETS[name]
        cases.append(measure(title, shapes(), peers, settings, report))
    return Result(
        "adam",
        dataclasses.asdict(settings),
        machine.describe(),
        cases,
        left_out=peers.left_out,
    )


def measure(
    title: str,
    shapes: list[tuple[int, ...]],
    peers: Peers,
    settings: AdamSettings,
    report: Report = silent,
) -> Case:
    """One set of tensors; each contestant has its own, but all share the gradients."""
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    generator = torch.Generator(device=device).manual_seed(settings.seed)

    def random_tensors() -> list[Tensor]:
        return [
            torch.randn(s, generator=generator, dtype=dtype, device=device) * 0.02 for s in shapes
        ]

    gradients = random_tensors()
    elements = sum(prod(shape) for shape in shapes)
    limit = copy_limit([STREAMS], buffer_bytes=LIMIT_BYTES, device=device)

    contestants = {OURS: _contestant(_effkern_adamw, random_tensors(), gradients)}
    for name, make_step in list(peers.found.items()):
        try:
            contestants[name] = _contestant(make_step, random_tensors(), gradients)
        except Exception as error:  # no compiler, a package that does not fit this machine
            peers.leave_out(name, error)
    contestants[COPY_LIMIT] = limit.contestant

    name = (
        f"AdamW, {title}: {len(shapes)} tensors, {elements / 1e6:.1f} M elements, {settings.dtype}"
    )
    times = alternate(
        contestants,
        rounds=settings.rounds,
        warm_up=WARM_UP,
        clock=clock_for(device),
        between=Scrubber(device).scrub,
        on_round=counter(report, name, WARM_UP + settings.rounds),
    )
    moved = moved_bytes([STREAMS], elements * dtype.itemsize)
    rows = make_rows(times, bytes_moved=moved, limit_bytes=limit.bytes_moved)
    return Case(name, rows, moved, elements, limit.streams)


def _effkern_adamw(parameters: list[nn.Parameter]) -> Callable[[], object]:
    return effkern.FusedAdamW(parameters, **ADAMW).step


def _contestant(make_step: MakeStep, values: list[Tensor], gradients: list[Tensor]) -> Contestant:
    parameters = [nn.Parameter(value) for value in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    step = make_step(parameters)
    step()  # makes the state, and compiles; a peer that cannot fails here
    return Contestant(lambda _: step())
