"""Results as a PNG: a panel for each case, a bar for each contestant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effkern.bench.results import COPY_LIMIT, OURS, Case, Result
from effkern.bench.tables import short

#: Colour-blind safe: effkern, its peers, the limit.
COLOURS = {"ours": "#0072b2", "peer": "#b0b0b0", "limit": "#e69f00"}

#: More cases than this are drawn in two columns.
COLUMN_FROM = 3


def draw(result: Result, file: Path) -> None:
    """Draw median times with quartiles; ``file`` ends in ``.png``, ``.svg`` or ``.pdf``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 if len(result.cases) <= COLUMN_FROM else 2
    rows = -(-len(result.cases) // columns)
    height = 1.3 + 0.3 * max(len(case.rows) for case in result.cases)
    figure = Figure(figsize=(8 * columns, height * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, case in zip(panels, result.cases, strict=False):
        _draw_case(panel, case)
    for panel in panels[len(result.cases) :]:
        panel.set_visible(False)
    figure.suptitle(
        f"effkern bench {result.benchmark}: time of one call, shorter is better", fontsize=10
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _draw_case(panel: Any, case: Case) -> None:
    unit, scale = ("ms", 1e3) if case.rows[0].seconds.median >= 1e-3 else ("µs", 1e6)
    names = [row.name for row in case.rows]
    medians = [row.seconds.median * scale for row in case.rows]
    below = [(row.seconds.median - row.seconds.low) * scale for row in case.rows]
    above = [(row.seconds.high - row.seconds.median) * scale for row in case.rows]
    colours = [COLOURS[_kind(name)] for name in names]
    bars = panel.barh(names, medians, xerr=(below, above), color=colours, capsize=2)
    panel.bar_label(
        bars, labels=[f"{short(value)} {unit}" for value in medians], padding=4, fontsize=8
    )
    panel.set_title(case.name, fontsize=9, loc="left")
    panel.invert_yaxis()
    panel.tick_params(labelsize=8)
    panel.margins(x=0.15)
    panel.set_xlabel(unit, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _kind(name: str) -> str:
    return {OURS: "ours", COPY_LIMIT: "limit"}.get(name, "peer")
