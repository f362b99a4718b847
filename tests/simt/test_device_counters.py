"""Step counters, learning rate, gradient scale and found_inf that lie on the device: the kernels
read them, and the last block of a tensor counts its step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from effkern.backends.table import TICKET
from tests.simt import build
from tests.simt.variants import CHUNK, DTYPES, VARIANTS, Planned, Variant
from tests.support.rules import Tensors, random_tensors

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler")

#: No element, one block, several blocks.
SIZES = [0, 3, CHUNK, 3 * CHUNK + 7, 2 * CHUNK]
#: Steps taken before, by tensor.
TAKEN = (0.0, 4.0, 1.0, 7.0, 0.0)

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def assert_equal(mine: Tensors, others: Tensors) -> None:
    for a, b in zip(mine.lists(), others.lists(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_variant
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64], ids=str)
def test_steps_are_those_of_counters_on_the_cpu(variant: Variant, step_dtype: torch.dtype) -> None:
    simt = build.load()
    mine = random_tensors(variant.rule, SIZES, steps=TAKEN, step_dtype=step_dtype)
    others = mine.clone()
    on_device = Planned(variant, mine, on_device=True)
    on_cpu = Planned(variant, others, on_device=False)
    for step in range(1, 4):
        simt.seed(step)  # another order of blocks: which one is the last must not matter
        on_device.step()
        on_cpu.step()
        assert [counter.item() for counter in mine.steps] == [t + step for t in TAKEN]
        assert_equal(mine, others)
        assert not on_device.plan.device_table[:, TICKET].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_variant
def test_an_infinity_undoes_the_step(variant: Variant, dtype: torch.dtype) -> None:
    build.load()
    tensors = random_tensors(variant.rule, SIZES, dtype, steps=TAKEN)
    before = tensors.clone()
    planned = Planned(variant, tensors, on_device=True)
    for found in (torch.tensor(1.0), torch.tensor([2.0], dtype=torch.float64)):
        planned.step(found_inf=found)
        assert_equal(tensors, before)
    planned.step(found_inf=torch.tensor(0.0))
    assert [counter.item() for counter in tensors.steps] == [t + 1 for t in TAKEN]
    assert not torch.equal(tensors.params[3], before.params[3])


@every_variant
def test_the_host_reads_an_infinity_where_it_counts(variant: Variant) -> None:
    """On the CPU, that is; one on a GPU is refused beside counters on the CPU."""
    simt = build.load()
    tensors = random_tensors(variant.rule, [3, 5])
    before = tensors.clone()
    planned = Planned(variant, tensors, on_device=False)
    simt.reset()
    for step in (partial(variant.by_lists, tensors), planned.step):
        step(found_inf=torch.tensor(1.0))
        assert_equal(tensors, before)
    assert simt.counts().launches == 0
    for step in (partial(variant.by_lists, tensors), planned.step):
        step(found_inf=torch.tensor(0.0))
    assert [counter.item() for counter in tensors.steps] == [2.0, 2.0]


@pytest.mark.parametrize(
    "variant", [variant for variant in VARIANTS if not variant.reads_steps], ids=str
)
def test_an_infinity_where_nothing_is_counted(variant: Variant) -> None:
    build.load()
    tensors = random_tensors(variant.rule, [3, 5])
    tensors.steps = []
    before = tensors.clone()
    variant.by_lists(tensors, found_inf=torch.tensor(1.0))
    assert_equal(tensors, before)
    variant.by_lists(tensors, found_inf=torch.tensor(0.0))
    assert not torch.equal(tensors.params[0], before.params[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_variant
def test_numbers_may_lie_on_the_device(variant: Variant, dtype: torch.dtype) -> None:
    build.load()
    tensors = random_tensors(variant.rule, [CHUNK + 9, 5], dtype)
    rate, scale = 0.0625, 32.0  # without rounding in any dtype
    expected = tensors.clone()
    variant.by_lists(expected, lr=rate)
    for number in (torch.float32, torch.float64):
        mine = tensors.clone()
        for grad in mine.grads:
            grad.mul_(scale)
        scaled = [grad.clone() for grad in mine.grads]
        variant.by_lists(
            mine,
            lr=-1.0,
            lr_tensor=torch.tensor(rate, dtype=number),
            grad_scale=torch.tensor([scale], dtype=number),
        )
        assert all(torch.equal(a, b) for a, b in zip(mine.grads, scaled, strict=True))
        mine.grads = expected.grads
        assert_equal(mine, expected)


def test_a_tensor_that_counts_no_steps_is_always_at_its_first() -> None:
    build.load()
    adam = VARIANTS[0]
    tensors = random_tensors(adam.rule, [CHUNK + 9, 5], steps=(0.0,))
    expected = tensors.clone()
    uncounted = Tensors(tensors.params, tensors.grads, tensors.states, [])
    for on_device in (False, True):
        planned = Planned(adam, uncounted, on_device=on_device)
        for _ in range(2):
            planned.step()
            for counter in expected.steps:
                counter.zero_()
            adam.by_lists(expected)
            assert_equal(replace(uncounted, steps=expected.steps), expected)
