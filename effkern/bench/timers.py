"""Timing contestants alternately, so that a machine's moods fall on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

#: Untimed scratch traffic between two timed calls; more than the last-level cache of common
#: machines.
SCRUB_BYTES = 256 * 2**20

#: Of a `Rotation`: inputs so small that more would fit the caches are not about memory.
MOST_SETS = 64


class Clock(Protocol):
    """Marks moments on a device and tells the seconds between two of them."""

    def mark(self) -> Any:
        """This moment, in the order of the device's work."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks; waits for the device where that is needed."""


class WallClock:
    """The host's clock, for work that is done when its call returns."""

    def mark(self) -> float:
        """Read the host's clock."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Seconds from ``start`` to ``end``."""
        return end - start


class CudaClock:
    """CUDA events on the current stream."""

    def mark(self) -> torch.cuda.Event:
        """Record an event behind the work that was queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds from ``start`` to ``end``; waits for ``end``."""
        end.synchronize()
        return start.elapsed_time(end) / 1000


def clock_for(device: torch.device) -> Clock:
    """The clock that tells the time of work on ``device``."""
    return CudaClock() if device.type == "cuda" else WallClock()


#: About a millisecond of a GPU: longer than the host takes to ask for a norm and its gradient.
BUSY_CYCLES = 2_000_000


def keep_busy(device: torch.device) -> None:
    """Give a GPU something to do, so that timed calls are queued behind it and the clock tells the
    device's time for them, not the host's; nothing on the CPU.
    """
    if device.type == "cuda":
        torch.cuda._sleep(BUSY_CYCLES)


@dataclass(frozen=True)
class Contestant:
    """Work to be timed.

    Attributes:
        run: the timed call; gets what ``prepare`` returned. Its result is kept until the clock has
            stopped.
        prepare: untimed, before each timed call: the next buffers, a graph to run backward through.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def alternate(
    contestants: Mapping[str, Contestant],
    *,
    rounds: int,
    clock: Clock,
    warm_up: int = 2,
    calls: int = 1,
    between: Callable[[], object] | None = None,
    on_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time every contestant once a round, in an order reversed each round: A B, B A, A B, ...

    Args:
        contestants: what to time, by name.
        rounds: timed rounds, at least one.
        clock: of the device where the work runs.
        warm_up: untimed rounds before them.
        calls: calls under one reading of the clock, for work too short to time alone.
        between: untimed, before each timed call: `Scrubber.scrub`, `release_free_memory`.
        on_round: called after each round, warm-up included; for progress.

    Returns:
        For each name the seconds of one call, a figure a round.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(warm_up + rounds):
        for name in names if number % 2 == 0 else reversed(names):
            seconds = _time_once(contestants[name], clock, calls, between)
            if number >= warm_up:
                times[name].append(seconds)
        if on_round is not None:
            on_round()
    return times


def _time_once(
    contestant: Contestant, clock: Clock, calls: int, between: Callable[[], object] | None
) -> float:
    run = contestant.run
    prepared = contestant.prepare()
    if between is not None:
        between()
    start = clock.mark()
    for _ in range(calls):
        result = run(prepared)
    end = clock.mark()
    seconds = clock.seconds(start, end) / calls
    del result  # only now: freeing a large output takes time that is not the call's
    return seconds


class Scrubber:
    """Sweeps the caches by writing a buffer larger than they are."""

    def __init__(self, device: torch.device, size: int = SCRUB_BYTES) -> None:
        self._buffer = torch.zeros(size, dtype=torch.uint8, device=device)

    def scrub(self) -> None:
        """Read and write the whole buffer."""
        self._buffer.add_(1)


class Rotation:
    """Hands out sets of buffers in turn, enough for a set to leave the caches before its turn."""

    def __init__(
        self, make: Callable[[], Any], *, set_bytes: int, total: int = SCRUB_BYTES
    ) -> None:
        """Call ``make`` for sets of ``set_bytes`` bytes: ``total`` bytes, 2 to `MOST_SETS` sets."""
        count = min(max(2, -(-total // max(1, set_bytes))), MOST_SETS)
        self._sets = [make() for _ in range(count)]
        self._next = 0

    def __len__(self) -> int:
        return len(self._sets)

    def __call__(self) -> Any:
        """The next set."""
        chosen = self._sets[self._next]
        self._next = (self._next + 1) % len(self._sets)
        return chosen
