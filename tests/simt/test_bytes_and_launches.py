"""Global memory traffic and launches of the CUDA kernels, against the least possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.simt import build
from tests.simt.variants import CHUNK, VARIANTS, Planned, Variant, blocks_of
from tests.support.norms import LAYER, Norm, every_norm
from tests.support.rules import random_tensors

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler")


def counts(work: Callable[[], object]) -> build.Counts:
    simt = build.load()
    simt.reset()
    work()
    return simt.counts()


#: Tensors of none, one and several blocks' worth of elements.
SIZES = [1, 3, 0, CHUNK, CHUNK + 1, 20000, 17]
BLOCKS = sum(blocks_of(SIZES))
#: Those that take tickets: of tensors that have more than one.
TICKETS = sum(blocks for blocks in blocks_of(SIZES) if blocks > 1)
TICKET = 4


@dataclass(frozen=True)
class Traffic:
    """What the launches of one step must move.

    Attributes:
        launches: how many.
        read, written: bytes.
    """

    launches: int
    read: int
    written: int


def least(variant: Variant, dtype: torch.dtype) -> Traffic:
    """The traffic of a step of tensors of `SIZES`, counters on the CPU."""
    elements, states = sum(SIZES) * dtype.itemsize, variant.states
    # A block reads its chunk row (2 x 4 bytes), and of the table the number of elements, an
    # address for each list, and the number of the step.
    block = 8 + 8 * (1 + 2 + states + variant.reads_steps)
    read, written = elements * (2 + states) + BLOCKS * block, elements * (1 + states)
    if variant.rule.name != "lamb":
        return Traffic(1, read, written)
    # The first launch leaves the parameter as it is. It writes two float64 sums a block, reads
    # them, and writes a number a tensor; the second launch reads all but the gradient.
    ratio = 8 if dtype == torch.float64 else 4
    read += BLOCKS * 2 * 8 + TICKETS * TICKET
    written += BLOCKS * 2 * 8 + TICKETS * TICKET + len(SIZES) * ratio
    return Traffic(2, read + elements * (1 + states) + BLOCKS * (block - 8 + ratio), written)


def traffic(seen: build.Counts) -> Traffic:
    return Traffic(seen.launches, seen.read, seen.written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_steps_read_and_write_each_element_once(variant: Variant, dtype: torch.dtype) -> None:
    build.load()
    tensors = random_tensors(variant.rule, SIZES, dtype)
    planned = Planned(variant, tensors, on_device=False)
    planned.step()
    seen = counts(planned.step)
    assert traffic(seen) == least(variant, dtype)
    assert seen.uploaded == 0
    seen = counts(partial(variant.by_lists, tensors))
    assert traffic(seen) == least(variant, dtype)
    assert seen.uploaded == 8 * planned.plan.table.numel() + 4 * planned.plan.chunks.numel()


@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_counters_on_the_device_add_their_own_bytes(
    variant: Variant, step_dtype: torch.dtype
) -> None:
    build.load()
    tensors = random_tensors(variant.rule, SIZES, step_dtype=step_dtype)
    planned = Planned(variant, tensors, on_device=True)
    planned.step()
    seen = counts(planned.step)
    host = least(variant, torch.float32)
    # Each block reads the counter's address, in place of the number of the step, and the counter.
    block = 8 * (not variant.reads_steps) + step_dtype.itemsize
    assert traffic(seen) == Traffic(
        host.launches,
        host.read + host.launches * BLOCKS * block + TICKETS * TICKET,
        host.written + TICKETS * TICKET + len(SIZES) * step_dtype.itemsize,
    )
    assert seen.uploaded == 0


@pytest.mark.parametrize("number_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_numbers_on_the_device_are_read_once_a_block(
    variant: Variant, number_dtype: torch.dtype
) -> None:
    build.load()
    tensors = random_tensors(variant.rule, SIZES)
    planned = Planned(variant, tensors, on_device=True)
    planned.step()
    plain = counts(planned.step)
    number = {"dtype": number_dtype}
    for name, value, launches in (
        ("lr_tensor", 0.1, plain.launches),
        ("found_inf", 0.0, plain.launches),
        ("grad_scale", 8.0, 1),  # LAMB's second launch reads no gradients
    ):
        seen = counts(partial(planned.step, **{name: torch.tensor(value, **number)}))
        assert seen.launches == plain.launches
        assert seen.read == plain.read + launches * BLOCKS * number_dtype.itemsize
        assert (seen.written, seen.uploaded) == (plain.written, 0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nothing_moves_where_an_infinity_was_found(variant: Variant) -> None:
    build.load()
    planned = Planned(variant, random_tensors(variant.rule, SIZES), on_device=True)
    planned.step()
    found = torch.tensor(1.0)
    seen = counts(lambda: planned.step(found_inf=found))
    assert seen.read == seen.launches * BLOCKS * found.itemsize
    assert (seen.written, seen.uploaded) == (0, 0)


@pytest.mark.parametrize("on_device", [False, True], ids=["on the CPU", "on the device"])
def test_the_table_is_uploaded_only_when_an_address_changes(on_device: bool) -> None:
    build.load()
    tensors = random_tensors(VARIANTS[0].rule, [100, 9000])
    planned = Planned(VARIANTS[0], tensors, on_device=on_device)
    planned.step()
    assert counts(planned.step).uploaded == 0
    others = [grad.clone() for grad in tensors.grads]
    rows = 2 * planned.plan.table.shape[1] * 8
    assert counts(lambda: planned.step(others)).uploaded == rows
    assert counts(lambda: planned.step(others)).uploaded == 0


def test_the_table_is_uploaded_when_tensors_disagree_on_their_steps() -> None:
    build.load()
    tensors = random_tensors(VARIANTS[0].rule, [5, 6], steps=(3.0, 7.0))
    planned = Planned(VARIANTS[0], tensors, on_device=False)
    planned.step()
    assert counts(planned.step).uploaded == 0
    tensors.steps[0].add_(1)
    assert counts(planned.step).uploaded == 2 * planned.plan.table.shape[1] * 8
    assert counts(planned.step).uploaded == 0


def forward(
    norm: Norm, x: Tensor, residual: Tensor | None, parameter: Tensor | None
) -> Callable[[], object]:
    parameters = [parameter] * norm.parameters
    if residual is None:
        return lambda: norm.op("forward", "simt")(x, *parameters, 1, 1e-5)
    return lambda: norm.op("add_forward", "simt")(x, residual, *parameters, 1, 1e-5)


# The longest that registers hold: 16,384 features in packs of 16 bytes, or one by one.
@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        (1, torch.float32),
        (64, torch.float32),
        (768, torch.bfloat16),
        (1023, torch.float32),
        (16383, torch.float16),
        (16384, torch.float32),
        (16384, torch.bfloat16),
        (8192, torch.float64),
    ],
)
@every_norm
def test_the_forward_pass_moves_held_rows_once(
    norm: Norm, features: int, dtype: torch.dtype
) -> None:
    rows, size = 5, dtype.itemsize
    x, residual = (torch.randn(rows, features).to(dtype) for _ in range(2))
    kept = norm.numbers * rows * (8 if dtype == torch.float64 else 4)
    build.load()

    seen = counts(forward(norm, x, None, None))
    assert (seen.launches, seen.read) == (1, rows * features * size)
    assert seen.written == rows * features * size + kept

    seen = counts(forward(norm, x, residual, None))
    assert (seen.launches, seen.read) == (1, 2 * rows * features * size)
    assert seen.written == 2 * rows * features * size + kept

    seen = counts(forward(norm, x, None, torch.ones(features, dtype=dtype)))
    # The parameters once a row.
    assert seen.read == (1 + norm.parameters) * rows * features * size


#: LayerNorm reads the first features of a long row for its origin.
ORIGIN_FEATURES = 64


@pytest.mark.parametrize("features", [16385, 16388])
@every_norm
def test_the_forward_pass_reads_longer_rows_twice(norm: Norm, features: int) -> None:
    rows = 2
    x, residual = torch.randn(rows, features), torch.randn(rows, features)
    row, origin = rows * features * 4, ORIGIN_FEATURES * rows * 4 if norm is LAYER else 0
    kept = norm.numbers * rows * 4
    build.load()
    seen = counts(forward(norm, x, None, None))
    assert (seen.launches, seen.read, seen.written) == (1, 2 * row + origin, row + kept)
    seen = counts(forward(norm, x, residual, None))
    # x, residual, their sum
    assert (seen.launches, seen.read, seen.written) == (1, 3 * row + 2 * origin, 2 * row + kept)


def test_layer_norm_reads_a_row_again_that_begins_far_from_its_mean() -> None:
    x = torch.randn(2, 16388)
    x[1, :100] += 50
    build.load()
    seen = counts(forward(LAYER, x, None, None))
    assert seen.read == (2 + 3) * 16388 * 4 + 2 * ORIGIN_FEATURES * 4


def backward(
    norm: Norm,
    x: Tensor,
    weight: Tensor | None,
    wants_weight: bool,
    total: bool = False,
    bias: Tensor | None = None,
) -> Callable[[], object]:
    grad = torch.randn_like(x)
    _, kept = norm.op("forward", "reference")(x, *[None] * norm.parameters, 1, 1e-5)
    grad_total = torch.randn_like(x) if total else None
    wants = [wants_weight] * norm.parameters
    kernel = norm.op("backward", "simt")
    from_y = () if bias is None else (True, bias)
    return lambda: kernel(grad, grad_total, x, weight, kept, 1, True, *wants, *from_y)


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        (1, torch.float32),
        (96, torch.bfloat16),
        (4095, torch.float32),  # without 16-byte accesses the registers hold half as much
        (8192, torch.float32),
        (8192, torch.bfloat16),
        (4096, torch.float64),
        (2047, torch.float64),
    ],
)
@every_norm
def test_the_backward_pass_moves_held_rows_once(
    norm: Norm, features: int, dtype: torch.dtype
) -> None:
    rows, size = 3, dtype.itemsize
    x, weight = torch.randn(rows, features).to(dtype), torch.ones(features, dtype=dtype)
    acc = 8 if dtype == torch.float64 else 4
    build.load()

    # What is kept of a row is read by each of its threads, from cache; all else once.
    def of_kept(seen: build.Counts) -> int:
        kept = rows * acc * norm.numbers
        threads_of_a_row, left = divmod(seen.read - 2 * rows * features * size, kept)
        assert left == 0
        assert 1 <= threads_of_a_row <= 512
        return threads_of_a_row * kept

    plain = counts(backward(norm, x, None, wants_weight=False))
    kept = of_kept(plain)
    assert (plain.launches, plain.written) == (1, rows * features * size)

    seen = counts(backward(norm, x, None, wants_weight=False, total=True))
    assert seen.read == plain.read + rows * features * size
    assert seen.written == plain.written

    # Three rows make one share of the parameters' gradients: written, then read for the result.
    seen = counts(backward(norm, x, weight, wants_weight=True))
    assert seen.launches == 2
    weights_from_cache, share = rows * features * size, norm.parameters * features * acc
    assert seen.read == 2 * rows * features * size + kept + weights_from_cache + share
    assert seen.written == rows * features * size + share + norm.parameters * features * size

    # From y: the weight once more, and the bias, from cache; nothing else.
    from_y = counts(backward(norm, x, weight, wants_weight=True, bias=weight))
    assert from_y.read == seen.read + 2 * weights_from_cache
    assert (from_y.launches, from_y.written) == (seen.launches, seen.written)


@pytest.mark.parametrize("features", [8193, 8196])
@every_norm
def test_the_backward_pass_reads_longer_rows_twice(norm: Norm, features: int) -> None:
    rows = 3
    x = torch.randn(rows, features)
    build.load()
    seen = counts(backward(norm, x, None, wants_weight=False))
    threads = -(-features // (4 if features % 4 == 0 else 1))
    means = 2 if norm is LAYER else 1
    # First pass: each thread of a row reads what is kept of it. Second pass: that and the means,
    # from cache.
    numbers = norm.numbers * rows * 1024 + (norm.numbers + means) * rows * threads
    assert seen.launches == 2
    assert seen.read == 4 * rows * features * 4 + numbers * 4
    assert seen.written == rows * features * 4 + means * rows * 4
