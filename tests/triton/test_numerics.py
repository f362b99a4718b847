"""Conversions inside kernels, bit for bit; the interpreter's own for bfloat16 are not exact."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from effkern.backends.triton.numerics import TRITON_DTYPE, larger, to_accumulator, to_storage


@triton.jit
def convert_kernel(source, target, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = to_accumulator(tl.load(source + offsets), tl.float32)
    tl.store(target + offsets, to_storage(x, DTYPE))


@triton.jit
def larger_kernel(a, b, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, larger(tl.load(a + offsets), tl.load(b + offsets)))


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.empty_like(x, dtype=dtype)
    convert_kernel[(x.numel() // 1024,)](x, target, DTYPE=TRITON_DTYPE[dtype], BLOCK=1024)
    return target


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    same = (actual.view(integer) == expected.view(integer)) | (actual.isnan() & expected.isnan())
    assert same.all()


def every_16_bit(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_becomes_float32_and_comes_back(dtype: torch.dtype) -> None:
    x = every_16_bit(dtype)
    assert_same_bits(converted(x, torch.float32), x.float())
    assert_same_bits(converted(x, dtype), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_nearest_even(dtype: torch.dtype) -> None:
    """Around every number of the dtype: a little below half way to the next, half way, above."""
    numbers = every_16_bit(dtype)
    low, high = numbers.float(), (numbers.view(torch.int16) + 1).view(dtype).float()
    half = (low + high) / 2
    for x in (half.nextafter(low), half, half.nextafter(high)):
        assert_same_bits(converted(x, dtype), x.to(dtype))


def test_the_larger_of_two_numbers_is_nan_if_one_is() -> None:
    numbers = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1.0, 2.0, 3.0])
    a, b = numbers.repeat(8), numbers.repeat_interleave(8)
    target = torch.empty_like(a)
    larger_kernel[(1,)](a, b, target, BLOCK=64)
    assert_same_bits(target, torch.maximum(a, b))
