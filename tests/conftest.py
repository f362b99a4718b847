from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support import backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        chosen = backends.selected()
        metafunc.parametrize("backend", chosen, ids=[b.name for b in chosen], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # One test that takes minutes: begun last, it would leave the other process without work.
    items.sort(key=lambda item: item.path.name != "test_sanitizers.py")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """One backend, in use for the whole test."""
    chosen: backends.Backend = request.param
    backends.prepare(chosen)
    with chosen.use():
        yield chosen


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
