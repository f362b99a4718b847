from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.processes import Processes


@pytest.fixture(scope="session")
def groups() -> Iterator[Callable[[int], Processes]]:
    """Process groups by their number of processes, each started once."""
    started: dict[int, Processes] = {}

    def group(count: int) -> Processes:
        if count not in started or not started[count].usable:
            started[count] = Processes(count)
        return started[count]

    yield group
    for one in started.values():
        one.close()


@pytest.fixture
def four(groups: Callable[[int], Processes]) -> Processes:
    return groups(4)


@pytest.fixture
def two(groups: Callable[[int], Processes]) -> Processes:
    return groups(2)
