"""Training two models alike, a step of one after a step of the other."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effkern
from effkern.bench.demo import text
from effkern.bench.demo.memory import peak_memory
from effkern.bench.demo.model import ByteGPT, ModelShape
from effkern.bench.progress import Report, silent
from effkern.bench.timers import Clock, clock_for

#: What a training step consists of; each is timed.
PHASES = ("forward", "backward", "optimizer")

#: The names of the two sides.
STOCK, EFFKERN = "stock PyTorch", "effkern"

LEARNING_RATE = 3e-4

#: Steps over which the learning rate rises to `LEARNING_RATE`.
RATE_WARM_UP = 20

#: What both optimizers are set to besides the learning rate.
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}

#: How the states of effkern's optimizer may be stored, as its ``state_dtype`` takes them.
STATE_DTYPES: dict[str, torch.dtype | str] = {"bfloat16": torch.bfloat16, "int8": "int8"}

#: Batches of the held-out text that both models are judged on.
HELD_OUT_BATCHES = 8


@dataclass(frozen=True)
class DemoSettings:
    """What to train.

    Attributes:
        device: where.
        seed: of the weights and the batches.
        text: the file to train on; None takes the source of Python's standard library.
        steps: at most so many steps of each side.
        seconds: no step begins when so many seconds of training are over; at least one step of each
            side runs.
        batch_size: windows of ``shape.context`` bytes in a step.
        shape: of the model.
        state_dtype: of effkern's optimizer states: one of `STATE_DTYPES`, or None for the
            parameters' own.
    """

    device: str = "cpu"
    seed: int = 0
    text: Path | None = None
    steps: int = 80
    seconds: float = 80.0
    batch_size: int = 8
    shape: ModelShape = field(default_factory=ModelShape)
    state_dtype: str | None = None


@dataclass
class Side:
    """One model in training, and what was seen of it.

    Attributes:
        name: `STOCK` or `EFFKERN`.
        model: trained in place.
        optimizer: over the model's parameters.
        losses: of each step, in nats per byte.
        times: seconds of each step, by phase.
        held_out: the loss on held-out text after the last step.
        peak_bytes: the most memory that a step of this side alone takes, parameters and state
            included.
        resident_bytes: of which parameters and optimizer state.
    """

    name: str
    model: ByteGPT
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    held_out: float = float("nan")
    peak_bytes: int = 0
    resident_bytes: int = 0

    def step(self, tokens: Tensor, clock: Clock) -> None:
        """One step on ``tokens``, each phase timed."""
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (len(self.losses) + 1) / RATE_WARM_UP)
        self.optimizer.zero_grad()
        marks = [clock.mark()]
        loss = self.model.loss(tokens)
        marks.append(clock.mark())
        loss.backward()
        marks.append(clock.mark())
        self.optimizer.step()
        marks.append(clock.mark())
        for phase, start, end in zip(PHASES, marks, marks[1:], strict=False):
            self.times[phase].append(clock.seconds(start, end))
        self.losses.append(loss.item())

    def step_times(self) -> list[float]:
        """Seconds of each whole step."""
        return [sum(phases) for phases in zip(*self.times.values(), strict=True)]


@dataclass(frozen=True)
class Training:
    """Two sides, trained.

    Attributes:
        settings: what was asked for.
        stock: with ``torch.nn.RMSNorm`` and ``torch.optim.AdamW(fused=True)``.
        effkern: the same model with both exchanged.
        parameters: how many each has.
        swapped_norms: how many norms were exchanged.
        seconds: of the whole training, both sides.
    """

    settings: DemoSettings
    stock: Side
    effkern: Side
    parameters: int
    swapped_norms: int
    seconds: float


def train(settings: DemoSettings, report: Report = silent) -> Training:
    """Train both sides; see `DemoSettings`.

    Raises:
        OSError, ValueError: the text cannot be read, or is too short.
    """
    context = settings.shape.context
    training_text, held_out_text = text.corpus(settings.text, context)
    device, clock = torch.device(settings.device), clock_for(torch.device(settings.device))
    stock, ours, swapped = make_sides(settings)
    generator = torch.Generator().manual_seed(settings.seed)

    def next_batch(source: Tensor) -> Tensor:
        return text.batch(source, generator, size=settings.batch_size, context=context).to(device)

    held_out = [next_batch(held_out_text) for _ in range(HELD_OUT_BATCHES)]
    start = time.monotonic()
    report("training", 0, settings.steps)
    for number in range(settings.steps):
        tokens = next_batch(training_text)
        # The order changes from step to step: neither side always finds the other's traces in the
        # caches.
        for side in (stock, ours) if number % 2 == 0 else (ours, stock):
            side.step(tokens, clock)
        what = f"training, loss {stock.losses[-1]:.3f} stock, {ours.losses[-1]:.3f} effkern"
        report(what, number + 1, settings.steps)
        if time.monotonic() - start >= settings.seconds:
            break
    seconds = time.monotonic() - start

    for side in (stock, ours):
        side.held_out = evaluate(side.model, held_out)
    for side in (stock, ours):
        side.resident_bytes, side.peak_bytes = peak_memory(side.model, side.optimizer, tokens)
    parameters = sum(p.numel() for p in stock.model.parameters())
    return Training(settings, stock, ours, parameters, swapped, seconds)


def make_sides(settings: DemoSettings) -> tuple[Side, Side, int]:
    """Both sides before their first step, with equal weights, and how many norms were exchanged."""
    torch.manual_seed(settings.seed)
    model = ByteGPT(settings.shape).to(settings.device)
    ours = copy.deepcopy(model)
    state_dtype = None if settings.state_dtype is None else STATE_DTYPES[settings.state_dtype]
    swapped = len(effkern.swap_norms(ours).swapped)
    return (
        Side(
            STOCK,
            model,
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, **ADAMW),
        ),
        Side(
            EFFKERN,
            ours,
            effkern.FusedAdamW(
                ours.parameters(), lr=LEARNING_RATE, state_dtype=state_dtype, **ADAMW
            ),
        ),
        swapped,
    )


@torch.no_grad()
def evaluate(model: ByteGPT, batches: list[Tensor]) -> float:
    """The mean loss over ``batches``, in nats per byte."""
    return statistics.fmean(model.loss(tokens).item() for tokens in batches)
