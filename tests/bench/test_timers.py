"""The arithmetic of the timers, with a clock that the contestants themselves move."""

import pytest
import torch

from effkern.bench.results import COPY_LIMIT, OURS, make_rows
from effkern.bench.spread import Spread, paired_ratio
from effkern.bench.tables import duration
from effkern.bench.timers import Contestant, Rotation, Scrubber, WallClock, alternate, clock_for


class FakeClock:
    """Time passes only when somebody says so."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start


def moving(clock, seconds, log, name):
    """A contestant that takes the next of ``seconds`` each time."""
    remaining = iter(seconds)

    def run(_):
        log.append(name)
        clock.now += next(remaining)

    return Contestant(run)


def test_contestants_alternate_and_warm_up_is_not_timed():
    clock, log = FakeClock(), []
    contestants = {
        "a": moving(clock, [9, 1, 2, 3], log, "a"),
        "b": moving(clock, [8, 2, 4, 6], log, "b"),
    }
    rounds = []
    times = alternate(
        contestants, rounds=3, warm_up=1, clock=clock, on_round=lambda: rounds.append(len(log))
    )
    assert times == {"a": [1, 2, 3], "b": [2, 4, 6]}
    assert "".join(log) == "abbaabba"
    assert rounds == [2, 4, 6, 8]


def test_preparation_and_what_happens_between_calls_are_not_timed():
    clock = FakeClock()
    seen = []

    def pass_time(seconds, result=None):
        clock.now += seconds
        return result

    contestant = Contestant(
        run=lambda prepared: seen.append(prepared) or pass_time(2.0),
        prepare=lambda: pass_time(100.0, "prepared"),
    )
    times = alternate(
        {"only": contestant},
        rounds=2,
        warm_up=0,
        calls=5,
        clock=clock,
        between=lambda: pass_time(1000.0),
    )
    assert times == {"only": [2.0, 2.0]}
    assert seen == ["prepared"] * 10


def test_the_result_of_a_call_outlives_its_timing():
    """Freeing a large output must not be counted as the call's."""
    clock = FakeClock()

    class Output:
        def __del__(self):
            clock.now += 50.0

    times = alternate({"only": Contestant(lambda _: Output())}, rounds=1, warm_up=0, clock=clock)
    assert times == {"only": [0.0]}
    assert clock.now == 50.0


def test_rotation_hands_out_every_set_before_it_starts_again():
    made = iter(range(100))
    rotation = Rotation(lambda: next(made), set_bytes=10, total=25)
    assert [rotation() for _ in range(5)] == [0, 1, 2, 0, 1]
    assert len(Rotation(lambda: None, set_bytes=1000, total=25)) == 2
    assert len(Rotation(lambda: None, set_bytes=0)) == 64


def test_scrubber_touches_its_whole_buffer():
    scrubber = Scrubber(torch.device("cpu"), size=1000)
    scrubber.scrub()
    assert bool((scrubber._buffer == 1).all())


def test_the_wall_clock_runs_forward_and_serves_the_cpu():
    clock = clock_for(torch.device("cpu"))
    assert isinstance(clock, WallClock)
    start = clock.mark()
    assert clock.seconds(start, clock.mark()) >= 0


def test_spread_of_known_values():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread(2.0, 1.0, 3.0).scaled(10) == Spread(20.0, 10.0, 30.0)


def test_ratios_are_taken_round_by_round():
    """The second round was ten times slower for both: the ratio does not notice."""
    assert paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0], [1.0, 2.0])


def test_rows_compare_with_ours_and_with_the_limit():
    times = {OURS: [1.0, 2.0], "peer": [3.0, 6.0], COPY_LIMIT: [0.5, 1.0]}
    ours, peer, limit = make_rows(times, bytes_moved=100, limit_bytes=60)
    assert (ours.speedup.median, peer.speedup.median, limit.speedup.median) == (1, 3, 0.5)
    assert ours.bandwidth.median == 75  # of 100 and 50 bytes per second
    assert limit.bandwidth.median == 90  # of 120 and 60
    assert ours.share_of_limit.median == pytest.approx(100 / 120)
    assert limit.share_of_limit.median == 1


def test_rows_without_bytes_have_no_bandwidth():
    (ours,) = make_rows({OURS: [1.0]})
    assert ours.bandwidth is None
    assert ours.share_of_limit is None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(2.5, "2.5 s"), (0.0821, "82.1 ms"), (1.5e-6, "1.5 µs"), (1234.5, "1,234 s"), (3e-9, "3 ns")],
)
def test_durations_in_the_unit_that_suits(seconds, shown):
    assert duration(seconds) == shown
