"""Watches on tensors, by the CPU library and in plain Python."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effkern.backends import native
from effkern.optim.watch import Watch


@pytest.fixture(params=["library", "python"])
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(native, "serves", lambda key: False)
    elif not native.serves("CPU"):
        pytest.skip(native.why_not("CPU"))


def swap(t: Tensor) -> None:
    t.data = t.data.clone()


def shorten(t: Tensor) -> None:
    t.data = t.data[:3]


def change_dtype(t: Tensor) -> None:
    t.data = t.data.double()


def reinterpret(t: Tensor) -> None:
    t.data = t.data.view(torch.int32)


def grow(t: Tensor) -> None:
    t.resize_(100, 100)


def share(t: Tensor) -> None:
    t.share_memory_()


CHANGES = [swap, shorten, change_dtype, reinterpret, grow, share]


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_every_change_is_noticed(change: Callable[[Tensor], None], which: int) -> None:
    tensors = [torch.randn(6, 6) for _ in range(3)]
    watch = Watch(tensors)
    assert not watch.moved()
    change(tensors[which])
    assert watch.moved()


@pytest.mark.usefixtures("_form")
def test_what_is_no_change() -> None:
    tensors = [torch.randn(6, 6), torch.randn(()), torch.randn(0, 3), torch.nn.Parameter()]
    watch = Watch(tensors)
    for t in tensors:
        with torch.no_grad():
            t.add_(1)
        t.data = t.data
        t.grad = torch.zeros_like(t)
    assert not watch.moved()
    assert not Watch([]).moved()


@pytest.mark.usefixtures("_form")
def test_many_tensors() -> None:
    """More than one thread's share."""
    tensors = [torch.zeros(2) for _ in range(9000)]
    watch = Watch(tensors)
    assert not watch.moved()
    for i in (0, 4999, 8999):
        swap(tensors[i])
        assert watch.moved()
        watch = Watch(tensors)


@pytest.mark.usefixtures("_form")
def test_it_keeps_its_tensors_and_lets_them_go() -> None:
    tensor = torch.zeros(2)
    alive = weakref.ref(tensor)
    watch = Watch([tensor])
    gc.disable()
    try:
        del tensor
        assert not watch.moved()
        assert alive() is not None
        del watch
        assert alive() is None
    finally:
        gc.enable()
