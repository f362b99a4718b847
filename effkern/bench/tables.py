"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from effkern.bench.results import COPY_LIMIT, OURS, Case, Result, Row
from effkern.bench.spread import Spread

#: What the row of the copy limit is.
LIMIT_NOTE = (
    "copy limit: a plain pass over as many streams, read (r) and written (w), in the same run"
)


def render(result: Result) -> RenderableType:
    """Every case as a table, then what was left out, the notes, and the machine."""
    parts: list[RenderableType] = []
    for case in result.cases:
        parts += [Text(_title(case), style="bold"), _case_table(case)]
    if any(case.limit_streams for case in result.cases):
        parts.append(Text(LIMIT_NOTE))
    parts += [Text(f"left out: {name}: {reason}") for name, reason in result.left_out.items()]
    parts += [Text(note) for note in result.notes]
    parts.append(Text(machine_line(result.machine, result.settings["device"])))
    return Group(*parts)


def machine_line(machine: Mapping[str, Any], device: str) -> str:
    """The machine in one line."""
    where = ", ".join(machine["gpus"]) if device.startswith("cuda") else machine["cpu"]
    return (
        f"{where}, {machine['threads']} threads, ISA {machine['cpu_isa'] or 'none'}, "
        f"torch {machine['torch']}, effkern {machine['effkern']}"
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{short(seconds / size)} {unit}"
    return f"{short(seconds / 1e-9)} ns"


def short(value: float) -> str:
    """Three digits that count, and none of them an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(spread: Spread) -> str:
    """A ratio with its quartiles."""
    return f"{spread.median:.2f} x  ({spread.low:.2f} to {spread.high:.2f})"


def _case_table(case: Case) -> Table:
    table = Table()
    table.add_column("", no_wrap=True)
    table.add_column("time", justify="right")
    with_bandwidth = case.bytes_moved is not None
    if case.of_overhead:
        table.add_column("effkern's time over it (quartiles)", justify="right")
    else:
        table.add_column("effkern's speed-up over it (quartiles)", justify="right")
    if with_bandwidth:
        table.add_column("GB/s", justify="right")
        table.add_column("of the copy limit", justify="right")
    for row in case.rows:
        label = row.name
        if row.name == COPY_LIMIT:
            label += f" ({case.limit_streams})"
        cells = [label, duration(row.seconds.median), _comparison(row, case)]
        if with_bandwidth:
            cells += _bandwidth(row)
        table.add_row(*cells, style="bold" if row.name == OURS else "")
    return table


def _title(case: Case) -> str:
    if case.bytes_moved is None or not case.elements:
        return case.name
    return f"{case.name}; {case.bytes_moved / case.elements:.3g} bytes an element"


def _comparison(row: Row, case: Case) -> str:
    if row.name in (OURS, COPY_LIMIT):
        return ""
    if case.of_overhead:
        # Quartiles change places when a ratio is turned over.
        spread = row.speedup
        return ratio(Spread(1 / spread.median, 1 / spread.high, 1 / spread.low))
    return ratio(row.speedup)


def _bandwidth(row: Row) -> list[str]:
    speed = "" if row.bandwidth is None else f"{row.bandwidth.median / 1e9:.1f}"
    share = "" if row.share_of_limit is None else f"{row.share_of_limit.median:.0%}"
    return [speed, share]
