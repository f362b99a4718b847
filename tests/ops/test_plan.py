"""Gradients entering a plan, by the CPU library and in plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern.backends import native
from effkern.backends.reference import plan as reference
from effkern.backends.table import GRAD
from effkern.ops import plan as ops
from effkern.optim.plan import Plan
from effkern.optim.storage import Storage

FORMS = [ops.put_gradients_, reference.put_gradients_]
forms = pytest.mark.parametrize("put", FORMS, ids=["library", "python"])


def make_plan(params: list[Tensor]) -> Plan:
    steps = [torch.zeros(()) for _ in params]
    states = [[torch.zeros_like(p) for p in params]]
    plain = Storage(torch.float32, as_param=True, master=False, stochastic=False)
    return Plan(params, states, steps, plain, [[]], [], [], on_cpu=True)


def call(put: Any, plan: Plan, params: list[Tensor], grads: list[Tensor]) -> int:
    return put(plan.table, plan.device_table, plan.layouts, params, grads)


def make_tensors() -> list[Tensor]:
    return [
        torch.randn(4, 6),
        torch.randn(6, 4).t(),
        torch.randn(()),
        torch.randn(3, 0),
        torch.randn(1, 5).t(),
        torch.randn(7),
    ]


def test_the_library_serves_where_it_is_there() -> None:
    if not native.serves("CPU"):
        pytest.skip(native.why_not("CPU"))
    kernels = torch._C._dispatch_dump("effkern::_put_gradients_")
    assert "CompositeExplicitAutograd" in kernels
    assert "PythonModule" not in kernels


@forms
def test_addresses_enter_the_table(put: Any) -> None:
    params, grads, others = make_tensors(), make_tensors(), make_tensors()
    plan = make_plan(params)
    assert call(put, plan, params, grads) == 1
    assert plan.table[:, GRAD].tolist() == [g.data_ptr() for g in grads]
    assert call(put, plan, params, grads) == 0
    mixed = [*grads[:5], others[5]]
    assert call(put, plan, params, mixed) == 1
    assert plan.table[:, GRAD].tolist() == [g.data_ptr() for g in mixed]


@forms
def test_thousands_of_tensors(put: Any) -> None:
    """More than one thread looks; the first of two strangers is named."""
    params = [torch.randn(1 + i % 5) for i in range(3001)]
    grads = [torch.randn_like(p) for p in params]
    plan = make_plan(params)
    assert call(put, plan, params, grads) == 1
    assert plan.table[:, GRAD].tolist() == [g.data_ptr() for g in grads]
    for strangers in ((2999, 3000), (0, 3000), (700, 1800)):
        changed = list(grads)
        for i in strangers:
            changed[i] = torch.randn(9)
        assert call(put, plan, params, changed) == -1 - strangers[0]
    assert call(put, plan, params, grads) == 0


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda t: t.double(),
    "shape": lambda t: torch.randn(6, 5),
    "dimensions": lambda t: t[None],
    "strides": lambda t: t.t().contiguous().t(),
    "transposed": lambda t: t.t(),
}


@forms
@pytest.mark.parametrize("of", ["params", "grads"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_stranger_is_named_and_nothing_is_written(put: Any, of: str, change: str) -> None:
    lists = {"params": make_tensors(), "grads": make_tensors()}
    plan = make_plan(lists["params"])
    assert call(put, plan, **lists) == 1
    before = plan.table.clone()
    lists["grads"] = make_tensors()
    lists[of][0] = CHANGES[change](lists[of][0])
    assert call(put, plan, **lists) == -1
    assert torch.equal(plan.table, before)


@forms
def test_a_parameter_that_moved(put: Any) -> None:
    params, grads = make_tensors(), make_tensors()
    plan = make_plan(params)
    params[5].data = params[5].data.clone()
    assert call(put, plan, params, grads) == -6


@forms
def test_strides_along_single_elements_do_not_count(put: Any) -> None:
    params = make_tensors()
    plan = make_plan(params)
    grads = [
        *make_tensors()[:3],
        torch.randn(3, 0).as_strided((3, 0), (17, 5)),
        torch.randn(5).as_strided((5, 1), (1, 99)),
        torch.randn(7),
    ]
    assert call(put, plan, params, grads) == 1


def test_values_that_are_not_in_memory_are_refused() -> None:
    """A negated view's memory holds the opposite; a zero tensor has none."""
    params = [torch.randn(3), torch.randn(3)]
    plan = make_plan(params)
    negated = torch.randn(3, dtype=torch.complex64).conj().imag
    for odd in (negated, torch._efficientzerotensor(3)):
        assert call(ops.put_gradients_, plan, params, [torch.randn(3), odd]) < 0


@forms
@pytest.mark.parametrize("of", ["params", "grads"])
def test_lists_of_another_length(put: Any, of: str) -> None:
    lists = {"params": make_tensors(), "grads": make_tensors()}
    plan = make_plan(lists["params"])
    lists[of].pop()
    with pytest.raises(RuntimeError, match="for each of the 6 rows"):
        call(put, plan, **lists)


def test_it_cannot_be_traced() -> None:
    params = make_tensors()
    plan = make_plan(params)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match="cannot be traced"),
    ):
        call(ops.put_gradients_, plan, params, make_tensors())
