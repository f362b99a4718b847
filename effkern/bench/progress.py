"""How long work tells how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable

#: Called with what is being done, how many steps of it are done, and of how many.
Report = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that nobody reads."""


def counter(report: Report, what: str, total: int) -> Callable[[], None]:
    """A function that reports one more step each time it is called; reports the start at once."""
    done = 0
    report(what, done, total)

    def step() -> None:
        nonlocal done
        done += 1
        report(what, done, total)

    return step
