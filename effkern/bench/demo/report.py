"""What the demo shows at its end: a table, a picture, and the figures as plain data."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from effkern.bench import machine, tables
from effkern.bench.demo.train import PHASES, Side, Training
from effkern.bench.memory import peak_process_memory
from effkern.bench.spread import Spread, paired_ratio

#: The two trainings must end with losses this close, relative to the stock one.
LOSS_TOLERANCE = 0.01

#: Steps at the start that no time is taken from, where there are more than twice as many.
WARM_UP = 3

#: The training loss at the end is the mean over the last part of the steps: this share, and at
#: least so many.
TAIL_SHARE, TAIL_LEAST = 0.1, 5


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of the table.

    Attributes:
        times: seconds by phase and for the whole ``step``, stock and effkern.
        speedups: stock's time over effkern's of the same step, by the same names.
        training_loss: mean over the last steps, stock and effkern.
        held_out_loss: on text that neither side trained on.
        loss_difference: the larger of both losses' relative differences.
        curve_difference: the largest relative difference between both sides' losses of one step.
    """

    times: dict[str, tuple[Spread, Spread]]
    speedups: dict[str, Spread]
    training_loss: tuple[float, float]
    held_out_loss: tuple[float, float]
    loss_difference: float
    curve_difference: float

    @property
    def losses_agree(self) -> bool:
        """Whether the trainings ended alike; a loss that is not a number agrees with nothing."""
        return self.loss_difference <= LOSS_TOLERANCE


def summarise(training: Training) -> Summary:
    """The figures that stand in the table."""
    stock, ours = training.stock, training.effkern
    skipped = WARM_UP if len(stock.losses) > 2 * WARM_UP else 0
    times, speedups = {}, {}
    for name in (*PHASES, "step"):
        of_stock, of_ours = (_times(side, name)[skipped:] for side in (stock, ours))
        times[name] = Spread.of(of_stock), Spread.of(of_ours)
        speedups[name] = paired_ratio(of_stock, of_ours)
    training_loss = _tail(stock.losses), _tail(ours.losses)
    held_out_loss = stock.held_out, ours.held_out
    differences = [abs(b - a) / abs(a) for a, b in (training_loss, held_out_loss)]
    curve = [abs(b - a) / abs(a) for a, b in zip(stock.losses, ours.losses, strict=True)]
    return Summary(
        times, speedups, training_loss, held_out_loss, _largest(differences), _largest(curve)
    )


def render(training: Training, summary: Summary) -> RenderableType:
    """The table and what is needed to read it."""
    stock, ours, settings = training.stock, training.effkern, training.settings
    table = Table(title="One training step, side by side", title_justify="left", title_style="bold")
    for column in ("", stock.name, ours.name, "speed-up (quartiles)"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("step", *PHASES):
        of_stock, of_ours = (tables.duration(spread.median) for spread in summary.times[name])
        label = "whole step" if name == "step" else f"  {name}"
        style = "bold" if name == "step" else ""
        table.add_row(label, of_stock, of_ours, tables.ratio(summary.speedups[name]), style=style)
    table.add_section()
    table.add_row("peak memory of a step", *_megabytes(stock.peak_bytes, ours.peak_bytes))
    table.add_row("  parameters and state", *_megabytes(stock.resident_bytes, ours.resident_bytes))
    extra = [side.peak_bytes - side.resident_bytes for side in (stock, ours)]
    table.add_row("  the rest, at the peak", *_megabytes(*extra))
    table.add_section()
    table.add_row("training loss at the end", *_losses(summary.training_loss))
    table.add_row("held-out loss", *_losses(summary.held_out_loss))

    steps = len(stock.losses)
    stopped = "" if steps == settings.steps else f", stopped by --seconds {settings.seconds:g}"
    lines = [
        f"{training.parameters / 1e6:.1f} M parameters, {steps} steps of {settings.batch_size} x "
        f"{settings.shape.context} bytes each{stopped}; losses in nats per byte; "
        f"both sides together took {training.seconds:.0f} s.",
        f"What changed: {training.swapped_norms} norms are effkern.nn.RMSNorm, "
        "and the optimizer is effkern.FusedAdamW"
        + (f" with states in {settings.state_dtype}." if settings.state_dtype else "."),
        f"Losses agree within {LOSS_TOLERANCE:.0%}: "
        + (f"yes ({summary.loss_difference:.2%})" if summary.losses_agree else "NO")
        + f"; at no step were they further apart than {summary.curve_difference:.2%}.",
    ]
    process = peak_process_memory()
    if process is not None:
        lines.append(
            "The process, which holds both sides and PyTorch itself, "
            f"peaked at {process / 1e6:,.0f} MB."
        )
    lines.append(tables.machine_line(machine.describe(), settings.device))
    return Group(table, *(Text(line) for line in lines))


def as_data(training: Training, summary: Summary) -> dict[str, Any]:
    """Everything as plain data for JSON."""
    settings = dataclasses.asdict(training.settings)
    settings["text"] = (
        str(training.settings.text) if training.settings.text else "Python standard library"
    )
    return {
        "benchmark": "demo",
        "settings": settings,
        "machine": machine.describe(),
        "parameters": training.parameters,
        "swapped_norms": training.swapped_norms,
        "seconds": training.seconds,
        "steps": len(training.stock.losses),
        "peak_process_bytes": peak_process_memory(),
        "summary": dataclasses.asdict(summary) | {"losses_agree": summary.losses_agree},
        "sides": {
            side.name: {
                "losses": side.losses,
                "times": side.times,
                "held_out_loss": side.held_out,
                "peak_bytes": side.peak_bytes,
                "resident_bytes": side.resident_bytes,
            }
            for side in (training.stock, training.effkern)
        },
    }


def draw(training: Training, summary: Summary, file: Path) -> None:
    """Draw loss curves, the time of each step, and where a median step's time went, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, times, phases = figure.subplots(1, 3)
    sides = ((training.stock, "#d55e00", "-"), (training.effkern, "#0072b2", "--"))
    for index, (side, colour, line) in enumerate(sides):
        steps = range(1, len(side.losses) + 1)
        losses.plot(steps, side.losses, line, color=colour, label=side.name)
        milliseconds = [seconds * 1e3 for seconds in side.step_times()]
        times.plot(steps, milliseconds, ".", color=colour, markersize=4)
        median = summary.times["step"][index].median * 1e3
        times.axhline(
            median, linestyle=line, color=colour, label=f"{side.name}, median {median:.0f} ms"
        )
        _draw_phases(phases, summary, index, side.name, colour)
    losses.set(title="Training loss", xlabel="step", ylabel="nats per byte")
    times.set(title="Time of a step", xlabel="step", ylabel="ms")
    times.set_ylim(0, 1.5 * max(spread.high for spread in summary.times["step"]) * 1e3)
    phases.set(title="Where the time went", ylabel="ms")
    phases.set_xticks(range(len(PHASES)), PHASES)
    phases.margins(y=0.15)
    for panel in (losses, times, phases):
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8)
    speedup = summary.speedups["step"]
    figure.suptitle(
        f"{training.parameters / 1e6:.1f} M-parameter GPT on bytes, {training.settings.device}: "
        f"speed-up of a step {tables.ratio(speedup)}"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _draw_phases(panel: Any, summary: Summary, index: int, name: str, colour: str) -> None:
    """One side's bars: the median time of each phase with its quartiles."""
    spreads = [summary.times[phase][index].scaled(1e3) for phase in PHASES]
    medians = [spread.median for spread in spreads]
    errors = (
        [spread.median - spread.low for spread in spreads],
        [spread.high - spread.median for spread in spreads],
    )
    places = [place + 0.4 * (index - 0.5) for place in range(len(PHASES))]
    bars = panel.bar(places, medians, 0.4, yerr=errors, color=colour, capsize=2, label=name)
    panel.bar_label(
        bars, labels=[tables.short(median) for median in medians], padding=2, fontsize=8
    )


def _largest(numbers: Sequence[float]) -> float:
    """The largest, or NaN: max() would drop one that does not come first."""
    return sum(numbers) if any(n != n for n in numbers) else max(numbers)


def _times(side: Side, name: str) -> list[float]:
    return side.step_times() if name == "step" else side.times[name]


def _tail(losses: Sequence[float]) -> float:
    return statistics.fmean(losses[-max(TAIL_LEAST, round(TAIL_SHARE * len(losses))) :])


def _megabytes(stock: int, ours: int) -> tuple[str, str, str]:
    return f"{stock / 1e6:,.0f} MB", f"{ours / 1e6:,.0f} MB", f"{(ours - stock) / 1e6:+,.0f} MB"


def _losses(pair: tuple[float, float]) -> tuple[str, str, str]:
    stock, ours = pair
    return f"{stock:.4f}", f"{ours:.4f}", f"{(ours - stock) / stock:+.2%}"
