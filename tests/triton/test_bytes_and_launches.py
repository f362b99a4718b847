"""Each input byte is read once and each output byte written once, in the fewest launches."""

from __future__ import annotations

from math import ceil

import pytest
import torch

from effkern.backends.triton import multi_tensor
from effkern.backends.triton.adam import adam_
from effkern.backends.triton.rms_norm import (
    BACKWARD_ROW_BYTES,
    FORWARD_ROW_BYTES,
    rms_norm_backward,
    rms_norm_forward,
    tile_for,
)
from tests.triton.interpreter import Counts, counting

#: What a program reads to find its work: two numbers of the chunk, and the tensor's length.
CHUNK_BYTES, LENGTH_BYTES, ADDRESS_BYTES = 8, 8, 8

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def adam_step(sizes: list[int], steps: list[float], dtype: torch.dtype, amsgrad: bool) -> Counts:
    def tensors() -> list[torch.Tensor]:
        return [torch.rand(size).to(dtype) for size in sizes]

    maxima = tensors() if amsgrad else []
    with counting() as counts:
        adam_(
            tensors(),
            tensors(),
            tensors(),
            tensors(),
            maxima,
            [torch.tensor(step) for step in steps],
            lr=1e-3,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=1e-2,
            decoupled=True,
            amsgrad=amsgrad,
            maximize=False,
        )
    return counts


@dtypes
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
def test_adam(dtype: torch.dtype, amsgrad: bool) -> None:
    """AdamW in float32: 16 bytes read and 12 written an element, and one launch."""
    sizes = [5, 0, 1024, multi_tensor.CHUNK + 3]
    counts = adam_step(sizes, [3.0] * len(sizes), dtype, amsgrad)
    tensors = 5 if amsgrad else 4
    chunks = sum(ceil(size / multi_tensor.CHUNK) for size in sizes)
    table = chunks * (CHUNK_BYTES + LENGTH_BYTES + tensors * ADDRESS_BYTES)
    assert counts == Counts(
        launches=1,
        read=tensors * dtype.itemsize * sum(sizes) + table,
        written=(tensors - 1) * dtype.itemsize * sum(sizes),
    )


def test_adam_with_parameters_that_joined_late() -> None:
    """Still one launch; each program reads its tensor's two bias corrections."""
    sizes = [7, 300]
    counts = adam_step(sizes, [9.0, 0.0], torch.float32, False)
    table = 2 * (CHUNK_BYTES + LENGTH_BYTES + 4 * ADDRESS_BYTES)
    corrections = 2 * (4 + 16)  # the tensor's index, and two float64
    assert counts == Counts(1, 16 * sum(sizes) + table + corrections, 12 * sum(sizes))


def test_adam_without_elements_launches_nothing() -> None:
    assert adam_step([0, 0], [0.0, 0.0], torch.float32, False) == Counts()


# Rows that fit, and one that is just too long for float32.
FORWARD_SHAPES = [(40, 96), (3, 16384), (2, 16385)]
BACKWARD_SHAPES = [(40, 96), (9, 8192), (9, 8193)]


@dtypes
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", FORWARD_SHAPES, ids=str)
def test_rms_norm_forward(dtype: torch.dtype, residual: bool, shape: tuple[int, int]) -> None:
    rows, features = shape
    x = torch.rand(shape).to(dtype)
    with counting() as counts:
        rms_norm_forward(x, x if residual else None, torch.rand(features), 1, 1e-6)
    tile = tile_for(features, torch.float32, FORWARD_ROW_BYTES)
    tensor, weight = rows * features * dtype.itemsize, ceil(rows / tile.rows) * features * 4
    reads = (1 + residual) + (tile.columns > 1)  # a long row's second read
    assert counts == Counts(1, reads * tensor + weight, (1 + residual) * tensor + rows * 4)


@dtypes
@pytest.mark.parametrize("wants_weight", [False, True], ids=["x", "x and weight"])
@pytest.mark.parametrize("shape", BACKWARD_SHAPES, ids=str)
def test_rms_norm_backward(dtype: torch.dtype, wants_weight: bool, shape: tuple[int, int]) -> None:
    rows, features = shape
    x, weight, rstd = torch.rand(shape).to(dtype), torch.rand(features), torch.rand(rows)
    with counting() as counts:
        rms_norm_backward(x, x, x, weight, rstd, 1, True, wants_weight)
    tile = tile_for(features, torch.float32, BACKWARD_ROW_BYTES)
    stretches = ceil(rows / max(8, tile.rows))
    tensor, row, numbers = rows * features * dtype.itemsize, features * 4, rows * 4

    expected = Counts(1, 3 * tensor + stretches * row + numbers, tensor)
    if tile.columns > 1:
        # First what each row's mean needs; then, for each block of columns, that mean beside rstd.
        expected.launches += 1
        expected.read += 2 * tensor + rows * row + numbers + (2 * tile.columns - 1) * numbers
        expected.written += numbers
    if wants_weight:
        expected.launches += 1
        expected.read += stretches * row
        expected.written += stretches * row + row
    assert counts == expected
