"""The figures of a benchmark: rows of a case, cases of a result, and the JSON they are kept in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effkern.bench.spread import Spread, paired_ratio

#: The contestant that the others are compared with.
OURS = "effkern"

#: The contestant that does nothing but move as many bytes in as many streams.
COPY_LIMIT = "copy limit"


@dataclass(frozen=True)
class Row:
    """One contestant's figures in one case.

    Attributes:
        name: the contestant.
        seconds: of one call.
        speedup: the contestant's time over effkern's: above 1, effkern is faster.
        bandwidth: the least bytes that the work must move, over its time, in bytes per second; None
            where the case is not about bandwidth.
        share_of_limit: ``bandwidth`` over that of the copy limit, 1 at the limit; None without one.
    """

    name: str
    seconds: Spread
    speedup: Spread
    bandwidth: Spread | None = None
    share_of_limit: Spread | None = None


@dataclass(frozen=True)
class Case:
    """Contestants at the same work.

    Attributes:
        name: what the work is.
        rows: one for each contestant, effkern's first.
        bytes_moved: the least bytes that one call must read and write; None where that says
            nothing.
        elements: how many elements one call works on.
        limit_streams: how many each pass of the copy limit reads and writes: "2r 1w".
        of_overhead: the figure of interest is what a call costs beside a peer's, not how fast it
            moves bytes.
    """

    name: str
    rows: list[Row]
    bytes_moved: int | None = None
    elements: int | None = None
    limit_streams: str = ""
    of_overhead: bool = False


@dataclass(frozen=True)
class Result:
    """What one benchmark found.

    Attributes:
        benchmark: its name on the command line.
        settings: device, dtype, rounds, seed and what else it ran with.
        machine: `effkern.bench.machine.describe`.
        cases: the figures.
        left_out: for each contestant that did not run, why.
        notes: what a reader of the figures must know.
    """

    benchmark: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    cases: list[Case]
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def write(self, file: Path) -> None:
        """Write everything as JSON."""
        write_json(file, dataclasses.asdict(self))


def write_json(file: Path, data: Any) -> None:
    """Write plain data as JSON, making the folder where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def make_rows(
    times: Mapping[str, Sequence[float]],
    *,
    bytes_moved: int | None = None,
    limit_bytes: int | None = None,
) -> list[Row]:
    """Rows from the times of `effkern.bench.timers.alternate`.

    Args:
        times: seconds by contestant and round; `OURS` must be among them, `COPY_LIMIT` may be.
        bytes_moved: the least bytes of one call, for the bandwidth.
        limit_bytes: the bytes that `COPY_LIMIT` moves in one call.
    """
    ours = times[OURS]
    rows = []
    for name, seconds in times.items():
        moved = limit_bytes if name == COPY_LIMIT else bytes_moved
        bandwidth = share = None
        if moved is not None:
            bandwidth = Spread.of([moved / s for s in seconds])
            if COPY_LIMIT in times and limit_bytes is not None:
                share = paired_ratio(times[COPY_LIMIT], seconds).scaled(moved / limit_bytes)
        rows.append(Row(name, Spread.of(seconds), paired_ratio(seconds, ours), bandwidth, share))
    return rows
