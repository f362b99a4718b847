"""Steps whose counters, learning rate and scale lie on the device: the kernel reads and counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from effkern.backends.table import TICKET
from tests.simt.variants import CHUNK, VARIANTS, Variant
from tests.support.rules import Tensors, random_tensors
from tests.triton.planned import Planned

variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
SIZES: list[Any] = [5, 0, (), CHUNK + 3]


def taken(variant: Variant, dtype: torch.dtype, on_device: bool, **keywords: Any) -> Tensors:
    """Two steps, counted by the kernel or by the host."""
    torch.manual_seed(0)
    tensors = random_tensors(variant.rule, SIZES, dtype, steps=(0.0, 7.0))
    planned = Planned(variant, tensors, on_device=on_device)
    for _ in range(2):
        planned.step(**keywords)
    assert not planned.plan.device_table[:, TICKET].any()
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@variants
def test_the_kernel_counts_as_the_host_does(variant: Variant, dtype: torch.dtype) -> None:
    by_host, by_kernel = (taken(variant, dtype, on_device) for on_device in (False, True))
    assert [step.item() for step in by_host.steps] == [2, 9, 2, 9]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for of_host, of_kernel in zip(by_host.lists(), by_kernel.lists(), strict=True):
        torch.testing.assert_close(of_kernel, of_host, rtol=tolerance, atol=tolerance)


@variants
def test_numbers_from_tensors_are_those_from_the_host(variant: Variant) -> None:
    plain = taken(variant, torch.float64, True, lr=0.125)
    numbers = {
        "lr_tensor": torch.tensor(0.125, dtype=torch.float64),
        "grad_scale": torch.ones(1),
        "found_inf": torch.zeros(()),
    }
    tensors = taken(variant, torch.float64, True, lr=9.0, **numbers)
    for a, b in zip(tensors.lists(), plain.lists(), strict=True):
        assert all(map(torch.equal, a, b))


@variants
def test_nothing_is_updated_or_counted_where_an_infinity_was_found(variant: Variant) -> None:
    tensors = random_tensors(variant.rule, SIZES, steps=(2.0,))
    before = [[t.clone() for t in one] for one in tensors.lists()]
    Planned(variant, tensors, on_device=True).step(found_inf=torch.tensor(2.0))
    for a, b in zip(tensors.lists(), before, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
@pytest.mark.parametrize("t", [0, 1, 10_000])
def test_bias_corrections_in_the_kernel(beta: float, t: int) -> None:
    """In float64 within 1e-10 of those of math.expm1, also where beta^t is close to 1."""
    adam = VARIANTS[0]
    tensors = random_tensors(adam.rule, [3], torch.float64, steps=(float(t),))
    for state in tensors.states:
        state[0].zero_()
    tensors.grads[0].fill_(0.5)
    before = tensors.params[0].clone()
    options = {"beta1": beta, "beta2": beta, "eps": 0.0, "weight_decay": 0.0, "lr": 1.0}
    Planned(adam, tensors, on_device=True).step(**options)
    rest = -math.expm1((t + 1) * math.log(beta)) if beta else 1.0
    first = (1 - beta) * 0.5 / rest
    second = math.sqrt((1 - beta) * 0.25 / rest)
    moved = before - tensors.params[0]
    torch.testing.assert_close(
        moved, torch.full_like(moved, first / second), rtol=1e-10, atol=1e-14
    )


def test_lamb_does_not_depend_on_what_stands_beside() -> None:
    """A tensor's norms are its own, whichever programs come before it."""
    lamb = VARIANTS[-1]
    tensors = random_tensors(lamb.rule, [9, 2 * CHUNK + 5, 0, 33])
    alone = [Tensors.of([[t.clone() for t in one] for one in tensors.alone(i).lists()])
             for i in range(4)]  # fmt: skip
    Planned(lamb, tensors, on_device=False).step()
    for i, one in enumerate(alone):
        Planned(lamb, one, on_device=False).step()
        for a, b in zip(one.lists(), tensors.alone(i).lists(), strict=True):
            assert all(map(torch.equal, a, b))
