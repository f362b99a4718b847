"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from effkern.bench.progress import Report

#: Seconds between two plain lines about the same work.
PLAIN_INTERVAL = 10.0

#: Columns of a table that does not go to a terminal.
PLAIN_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """Where to print; wide enough for the tables when nobody's terminal sets the width."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=PLAIN_WIDTH)


@contextmanager
def progress() -> Iterator[Report]:
    """A `Report` that shows on stderr, so that stdout has the result alone."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield _PlainProgress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            if done == 0:
                bar.reset(task)
            bar.update(task, description=what, completed=done, total=total)

        yield report


class _PlainProgress:
    """A line when work starts, and then at most one every `PLAIN_INTERVAL` seconds."""

    def __init__(self) -> None:
        self._screen = console(stderr=True)
        self._printed = float("-inf")

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0 or now - self._printed >= PLAIN_INTERVAL:
            self._printed = now
            self._screen.print(
                f"{what}: {done} of {total}", highlight=False, markup=False, soft_wrap=True
            )
