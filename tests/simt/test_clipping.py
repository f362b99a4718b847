"""Sums of squares of gradients, and steps clipped by them: numbers, bytes, launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effkern.backends.table import TICKET
from tests.simt import build
from tests.simt.variants import CHUNK, DTYPES, VARIANTS, Planned, Variant, at_offset, blocks_of
from tests.support.rules import BY_NAME, random_tensors

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler")

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
SIZES = [5, 0, CHUNK, CHUNK + 3]
BLOCKS = sum(blocks_of(SIZES))


def sum_of(grads: list[Tensor]) -> float:
    return sum(grad.double().square().sum().item() for grad in grads)


def gradients(sizes: list[Any], dtype: torch.dtype) -> list[Tensor]:
    return random_tensors(BY_NAME["sgd"], sizes, dtype).grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_read_once_in_one_launch(dtype: torch.dtype) -> None:
    simt = build.load()
    grads = gradients(SIZES, dtype)
    squares = torch.full((5,), -1.0, dtype=torch.float64)
    simt.reset()
    torch.ops.effkern._squares_.simt(squares, 3, grads)
    assert squares[[0, 1, 2, 4]].tolist() == [-1] * 4
    assert squares[3].item() == pytest.approx(sum_of(grads), rel=1e-14)
    # A block's chunk row, the tensor's length and the gradient's address; each block's sum, there
    # and back, and its ticket; the result.
    seen = simt.counts()
    assert seen.launches == 1
    assert seen.read == sum(SIZES) * dtype.itemsize + BLOCKS * (8 + 2 * 8 + 8 + 4)
    assert seen.written == BLOCKS * (8 + 4) + 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[], [0], [0, (3, 0)], [1], [CHUNK - 1, 9]], ids=str)
def test_sums_of_any_tensors(sizes: list[Any], dtype: torch.dtype) -> None:
    build.load()
    for offset in (0, 1):
        grads = [at_offset(grad, offset) for grad in gradients(sizes, dtype)]
        squares = torch.full((2,), -1.0, dtype=torch.float64)
        torch.ops.effkern._squares_.simt(squares, 0, grads)
        assert squares.tolist() == [pytest.approx(sum_of(grads), rel=1e-14), -1.0]


def test_the_order_of_threads_and_blocks_changes_no_bit() -> None:
    simt = build.load()
    grads = gradients([5 * CHUNK + 3, 700], torch.float32)
    squares = torch.zeros(3, dtype=torch.float64)
    for seed in range(3):
        simt.seed(seed)
        torch.ops.effkern._squares_.simt(squares, seed, grads)
    assert squares[0] == squares[1] == squares[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_variant
def test_steps_are_clipped(variant: Variant, dtype: torch.dtype) -> None:
    """Numbers in several places, and gradients that were scaled: as the reference has it; where the
    norm is small enough, as without clipping.
    """
    build.load()
    tensors = random_tensors(variant.rule, [300, 5], dtype)
    scale = torch.tensor(2.0)
    total = sum_of(tensors.grads)
    norm = total**0.5 / 2
    squares = torch.tensor([0.25 * total, 0.0, 0.75 * total], dtype=torch.float64)
    for max_norm in (norm / 3, norm * 3):
        mine, right, plain = (tensors.clone() for _ in range(3))
        variant.by_lists(mine, squares=squares, max_norm=max_norm, grad_scale=scale)
        variant.by_lists(right, "reference", squares=squares, max_norm=max_norm, grad_scale=scale)
        variant.by_lists(plain, grad_scale=scale)
        eps = torch.finfo(dtype).eps
        for a, b, p in zip(mine.lists(), right.lists(), plain.lists(), strict=True):
            torch.testing.assert_close(a, b, rtol=8 * eps, atol=32 * eps)
            if max_norm > norm:
                assert all(map(torch.equal, a, p))


def test_a_norm_that_is_no_number_is_not_hidden() -> None:
    build.load()
    tensors = random_tensors(VARIANTS[0].rule, [5])
    squares = torch.tensor([torch.nan], dtype=torch.float64)
    VARIANTS[0].by_lists(tensors, squares=squares, max_norm=1.0)
    assert tensors.params[0].isnan().all()


@every_variant
def test_the_numbers_are_read_once_a_block(variant: Variant) -> None:
    simt = build.load()
    tensors = random_tensors(variant.rule, SIZES)
    squares = torch.ones(3, dtype=torch.float64)
    seen = []
    for keywords in ({}, {"squares": squares, "max_norm": 1.0}):
        simt.reset()
        variant.by_lists(tensors, **keywords)
        seen.append(simt.counts())
    plain, clipped = seen
    assert clipped.launches == plain.launches
    assert clipped.read == plain.read + BLOCKS * squares.nbytes
    assert (clipped.written, clipped.uploaded) == (plain.written, plain.uploaded)


@pytest.mark.parametrize("on_device", [False, True], ids=["on the CPU", "on the device"])
@every_variant
def test_clipped_steps_by_plan(variant: Variant, on_device: bool) -> None:
    """The sum of squares uploads a table that has moved, and the step after it finds it right; also
    where tensors do not agree on their steps.
    """
    simt = build.load()
    tensors = random_tensors(variant.rule, SIZES, steps=(0.0, 4.0, 1.0))
    expected = tensors.clone()
    squares = torch.zeros(1, dtype=torch.float64)
    planned = Planned(variant, tensors, on_device=on_device)
    table = planned.plan.table.nbytes
    max_norm = sum_of(tensors.grads) ** 0.5 / 2
    for step in range(4):
        if step == 2:
            tensors.grads = [grad.clone() for grad in tensors.grads]
        simt.reset()
        planned.clipped_step(squares, max_norm)
        seen = simt.counts()
        assert seen.launches == (3 if variant.rule.name == "lamb" else 2)
        if step:
            assert seen.uploaded == (table if step == 2 else 0)
        assert squares.item() == pytest.approx(sum_of(tensors.grads), rel=1e-14)
        variant.by_lists(expected, squares=squares, max_norm=max_norm)
        for a, b in zip(tensors.lists(), expected.lists(), strict=True):
            assert all(map(torch.equal, a, b))
        assert not planned.plan.device_table[:, TICKET].any()


REFUSED = {
    "one dimension": (torch.zeros((), dtype=torch.float64), 0, "squares must be a"),
    "float64": (torch.zeros(2), 0, "squares must be a contiguous float64"),
    "too far": (torch.zeros(2, dtype=torch.float64), 2, "place is 2"),
    "negative": (torch.zeros(2, dtype=torch.float64), -1, "place is -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_places_for_sums(case: str) -> None:
    build.load()
    squares, place, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.effkern._squares_.simt(squares, place, [torch.ones(3)])
    assert not squares.any()
