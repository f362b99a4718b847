"""Global memory traffic and launches of the CUDA kernels, against the least possible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import effkern
from effkern.backends import choice
from tests.simt import build

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler")

#: A block of Adam reads its chunk (2 x 4 bytes) and 6 numbers of the table, 7 with amsgrad.
ADAM_BLOCK_BYTES = 8 + 6 * 8
CHUNK = 8192


def counts(work: Callable[[], object]) -> build.Counts:
    simt = build.load()
    simt.reset()
    with choice.use_backend("simt"):
        work()
    return simt.counts()


def adam(dtype: torch.dtype, sizes: list[int], **options: bool) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    return effkern.FusedAdamW(params, **options)


@pytest.mark.parametrize(
    ("dtype", "amsgrad"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float64, False),
    ],
)
def test_adam_reads_and_writes_each_element_once_in_one_launch(
    dtype: torch.dtype, amsgrad: bool
) -> None:
    sizes = [1, 3, 0, 8192, 8193, 20000, 17]
    blocks = sum(-(-size // CHUNK) for size in sizes)
    optimizer = adam(dtype, sizes, amsgrad=amsgrad)
    build.load()
    with choice.use_backend("simt"):
        optimizer.step()  # makes the states and the plan
    seen = counts(optimizer.step)
    tensors_read, tensors_written = (5, 4) if amsgrad else (4, 3)  # float32: 16 and 12 bytes
    table = blocks * (ADAM_BLOCK_BYTES + 8 * amsgrad)
    assert seen.launches == 1
    assert seen.read == tensors_read * sum(sizes) * dtype.itemsize + table
    assert seen.written == tensors_written * sum(sizes) * dtype.itemsize


def test_the_table_is_uploaded_only_when_an_address_changes() -> None:
    optimizer = adam(torch.float32, [100, 9000])
    build.load()
    with choice.use_backend("simt"):
        optimizer.step()
    assert counts(optimizer.step).uploaded == 0
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.randn_like(param)  # the old gradient is still alive here: a new address
    assert counts(optimizer.step).uploaded == 2 * 8 * 8
    assert counts(optimizer.step).uploaded == 0


def forward(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> Callable[[], object]:
    ops = torch.ops.effkern
    if residual is None:
        return lambda: ops._rms_norm_forward.simt(x, weight, 1, 1e-5)
    return lambda: ops._add_rms_norm_forward.simt(x, residual, weight, 1, 1e-5)


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
def test_rms_norm_forward_moves_held_rows_once(features: int, dtype: torch.dtype) -> None:
    rows, size = 5, dtype.itemsize
    x, residual = (torch.randn(rows, features).to(dtype) for _ in range(2))
    rstd = rows * (8 if dtype == torch.float64 else 4)
    build.load()

    seen = counts(forward(x, None, None))
    assert (seen.launches, seen.read) == (1, rows * features * size)
    assert seen.written == rows * features * size + rstd

    seen = counts(forward(x, residual, None))
    assert (seen.launches, seen.read) == (1, 2 * rows * features * size)
    assert seen.written == 2 * rows * features * size + rstd

    seen = counts(forward(x, None, torch.ones(features, dtype=dtype)))
    assert seen.read == 2 * rows * features * size  # the weight once a row


@pytest.mark.parametrize("features", [16385, 16388])
def test_rms_norm_forward_reads_longer_rows_twice(features: int) -> None:
    rows = 2
    x, residual = torch.randn(rows, features), torch.randn(rows, features)
    build.load()
    seen = counts(forward(x, None, None))
    assert (seen.launches, seen.read) == (1, 2 * rows * features * 4)
    assert seen.written == rows * features * 4 + rows * 4
    seen = counts(forward(x, residual, None))
    assert (seen.launches, seen.read) == (1, 3 * rows * features * 4)  # x, residual, their sum
    assert seen.written == 2 * rows * features * 4 + rows * 4


def backward(
    x: Tensor, weight: Tensor | None, wants_weight: bool, total: bool = False
) -> Callable[[], object]:
    grad = torch.randn_like(x)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = torch.ones(x.shape[:-1], dtype=acc)
    grad_total = torch.randn_like(x) if total else None
    kernel = torch.ops.effkern._rms_norm_backward.simt
    return lambda: kernel(grad, grad_total, x, weight, rstd, 1, True, wants_weight)


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        (1, torch.float32),
        (96, torch.bfloat16),
        (8191, torch.float32),
        (8192, torch.float32),
        (8192, torch.bfloat16),
        (4096, torch.float64),
    ],
)
def test_rms_norm_backward_moves_held_rows_once(features: int, dtype: torch.dtype) -> None:
    rows, size = 3, dtype.itemsize
    x, weight = torch.randn(rows, features).to(dtype), torch.ones(features, dtype=dtype)
    acc = 8 if dtype == torch.float64 else 4
    build.load()

    # rstd is read by each thread of a row, from cache; all else once.
    def without_rstd(seen: build.Counts) -> int:
        threads_of_a_row, left = divmod(seen.read - 2 * rows * features * size, rows * acc)
        assert left == 0
        assert 1 <= threads_of_a_row <= 512
        return rows * threads_of_a_row * acc

    plain = counts(backward(x, None, wants_weight=False))
    rstd = without_rstd(plain)
    assert (plain.launches, plain.written) == (1, rows * features * size)

    seen = counts(backward(x, None, wants_weight=False, total=True))
    assert seen.read == plain.read + rows * features * size
    assert seen.written == plain.written

    # Three rows make one share of the weight's gradient: written, then read for the result.
    seen = counts(backward(x, weight, wants_weight=True))
    assert seen.launches == 2
    weights_from_cache = rows * features * size
    assert seen.read == 2 * rows * features * size + rstd + weights_from_cache + features * acc
    assert seen.written == rows * features * size + features * acc + features * size


@pytest.mark.parametrize("features", [8193, 8196])
def test_rms_norm_backward_reads_longer_rows_twice(features: int) -> None:
    rows = 3
    x = torch.randn(rows, features)
    build.load()
    seen = counts(backward(x, None, wants_weight=False))
    threads = -(-features // (4 if features % 4 == 0 else 1))
    # Second pass: each thread of a row reads rstd and the projection, from cache.
    row_scalars = rows * 4 + 2 * rows * threads * 4
    assert seen.launches == 2
    assert seen.read == 4 * rows * features * 4 + row_scalars
    assert seen.written == rows * features * 4 + rows * 4
