"""`torch.library.opcheck` on the ops of steps, with every kind of argument that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effkern.backends.table import KEY
from effkern.optim.plan import Plan
from effkern.optim.storage import Storage
from tests.support.rules import RULES, Rule, random_tensors
from tests.support.stored import Stored

rules = pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
SIZES: list[Any] = [3, (2, 4)]

#: How parameters and states are stored: the arguments of `Stored`.
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": torch.float32, "state": "int8"},
    "masters": {"dtype": torch.float16, "state": torch.float32, "masters": True},
    "keys": {"dtype": torch.bfloat16, "state": torch.bfloat16, "keys": True, "masters": True},
}


def tensor_keywords() -> dict[str, Any]:
    """What clips, and what a GradScaler sets."""
    return {
        "squares": torch.tensor([2.0, 3.0], dtype=torch.float64),
        "max_norm": 1.0,
        "grad_scale": torch.tensor(2.0),
        "found_inf": torch.tensor(0.0),
    }


@pytest.mark.parametrize("way", WAYS)
@rules
def test_on_lists(rule: Rule, way: str) -> None:
    asked = dict(WAYS[way])
    stored = Stored(
        rule, SIZES, asked.pop("dtype"), "cpu", asked.pop("state"), rule.options, **asked
    )
    op = getattr(torch.ops.effkern, f"_{rule.name}_").default
    stored.step(lambda *args, **kw: torch.library.opcheck(op, args, kw), **tensor_keywords())


def test_on_lists_by_reference() -> None:
    """One schema for all rules and backends: one of each kind."""
    (rule, *_) = RULES
    stored = Stored(rule, SIZES, torch.float32, "cpu", "int8", rule.options)
    op = torch.ops.effkern._adam_.reference
    stored.step(lambda *args, **kw: torch.library.opcheck(op, args, kw), **tensor_keywords())


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_squares_of_lists(overload: str) -> None:
    squares, grads = torch.zeros(3, dtype=torch.float64), [torch.randn(5), torch.randn(0)]
    op = getattr(torch.ops.effkern._squares_, overload)
    torch.library.opcheck(op, (squares, 1, grads))


@rules
def test_by_plan(rule: Rule) -> None:
    """Addresses cannot be traced: the schema, and what autograd makes of it."""
    tensors = random_tensors(rule, SIZES, torch.bfloat16)
    kept = rule.kept(rule.options)
    states = [one if keep else [] for one, keep in zip(tensors.states, kept, strict=True)]
    storage = Storage(torch.bfloat16, as_param=True, master=True, stochastic=True)
    masters = [p.float() for p in tensors.params]
    plan = Plan(tensors.params, states, tensors.steps, storage, [], masters, [7, 9], on_cpu=True)
    assert plan.table[:, KEY].tolist() == [7, 9]
    ops = torch.ops.effkern
    checks = ("test_schema", "test_autograd_registration")
    put = (plan.table, plan.device_table, plan.layouts, tensors.params, tensors.grads)
    ops._put_gradients_(*put)
    arguments = (*plan.arguments(), False)
    torch.library.opcheck(
        getattr(ops, f"_{rule.name}_planned_").default,
        arguments,
        {**rule.options, **tensor_keywords()},
        test_utils=checks,
    )
    squares = torch.zeros(2, dtype=torch.float64)
    torch.library.opcheck(
        ops._squares_planned_.default, (*arguments, squares, 1), test_utils=checks
    )
