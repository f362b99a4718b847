"""Conversions inside kernels, bit for bit; the interpreter's own for bfloat16 are not exact.

Stochastic rounding and states in 8 bits, against their definitions in the reference.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from effkern.backends.reference import quantize as reference
from effkern.backends.reference.rounding import stochastically_rounded
from effkern.backends.triton.numerics import TRITON_DTYPE, larger, to_accumulator, to_storage
from effkern.backends.triton.quantize import dequantized, quantized, scales_of
from effkern.backends.triton.rounding import rounded_stochastically, rounding_seed


@triton.jit
def convert_kernel(source, target, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = to_accumulator(tl.load(source + offsets), tl.float32)
    tl.store(target + offsets, to_storage(x, DTYPE))


@triton.jit
def larger_kernel(a, b, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, larger(tl.load(a + offsets), tl.load(b + offsets)))


@triton.jit
def round_kernel(source, target, key, t, first, BLOCK: tl.constexpr):
    start = first + tl.program_id(0) * BLOCK
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = rounding_seed(tl.load(key), tl.load(t))
    index = start + tl.arange(0, BLOCK).to(tl.int64)
    y = rounded_stochastically(tl.load(source + place), seed, start, index)
    tl.store(target + place, y)


@triton.jit
def quantize_kernel(
    source, codes, scales, target, SIGNED: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * ROW + tl.arange(0, ROW)[None, :]
    values = tl.load(source + place)
    new = scales_of(values)
    code = quantized(values, new, SIGNED)
    tl.store(codes + place, code)
    tl.store(scales + row, new)
    tl.store(target + place, dequantized(code.to(tl.float32), new, SIGNED))


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


def awkward_values() -> torch.Tensor:
    """float32 of every magnitude and both signs, subnormal, huge, infinite and NaN among them."""
    torch.manual_seed(0)
    values = torch.randn(8192) * 2.0 ** torch.randint(-140, 120, (8192,)).float()
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38, 3.3895e38, torch.inf, -torch.inf]
    values[: len(special)] = torch.tensor(special)
    values[len(special)] = torch.nan
    assert values.isfinite().sum() == 8192 - 3
    assert ((values != 0) & (values.abs() < 1.1754944e-38)).any()
    return values


@pytest.mark.parametrize("key", [0, 1, -12345, 7919 << 33])
@pytest.mark.parametrize("t", [1.0, 7.0, 16777216.0])
def test_stochastic_rounding_is_that_of_the_reference(key: int, t: float) -> None:
    values = awkward_values()
    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    number = torch.tensor([t], dtype=torch.float64)
    round_kernel[(8,)](values, rounded, torch.tensor([key]), number, 0, BLOCK=1024)
    assert_same_bits(rounded, stochastically_rounded(values, key, t))


def test_stochastic_rounding_beyond_the_first_elements_of_a_huge_tensor() -> None:
    """The hash of csrc/math/rounding.h, in Python, at an index of more than 32 bits."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    key, t, first = 5 << 35 | 3, 9, 11 * 2**32 + 8192
    values = torch.randn(1024)
    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    number = torch.tensor([float(t)], dtype=torch.float64)
    round_kernel[(1,)](values, rounded, torch.tensor([key]), number, first, BLOCK=1024)
    stream = mix(mix(mix(key & 0xFFFFFFFF) ^ key >> 32) ^ t) ^ mix(first >> 32)
    for i, bits in enumerate((values.view(torch.int32).long() & 0xFFFFFFFF).tolist()):
        random = mix(((first + i & 0xFFFFFFFF) * 0x9E3779B9 + stream) & 0xFFFFFFFF)
        expected = bits + (random & 0xFFFF) >> 16
        assert rounded[i].view(torch.int16).item() & 0xFFFF == expected


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_8_bits_are_those_of_the_reference(signed: bool, rows: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(16, 256) * 2.0 ** torch.randint(-20, 20, (16, 1)).float()
    values *= 2.0 ** torch.randint(-12, 1, (16, 256)).float()
    values[3] = 0.0
    values[4, 7], values[5, 0], values[6, 255] = torch.nan, torch.inf, 3.4e38
    values[7] = values[7].clamp(-1, 1) * 1e-39
    values = (values if signed else values.abs()).reshape(-1)
    dtype = torch.int8 if signed else torch.uint8
    codes, scales, back = torch.empty_like(values, dtype=dtype), torch.empty(16), values.clone()
    quantize_kernel[(16 // rows,)](values, codes, scales, back, SIGNED=signed, ROWS=rows, ROW=256)
    expected, expected_scales = reference.quantized(values, signed)
    assert_same_bits(scales, expected_scales)
    # Where all is in the ordinary range; next to a tie the product may round to either side.
    ordinary = torch.ones(16, dtype=torch.bool)
    ordinary[torch.tensor([4, 5, 7])] = False
    ordinary = ordinary.repeat_interleave(256)
    off = (codes.int() - expected.int()).abs()[ordinary]
    assert off.max() <= 1
    assert (off > 0).float().mean() < 1e-2
    of_codes = reference.dequantized(codes, scales)
    torch.testing.assert_close(back, of_codes, rtol=1e-6, atol=1e-44, equal_nan=True)
    blocks = back.view(16, 256)
    assert not blocks[4].isfinite().any()
    assert not blocks[5].isfinite().any()
    assert blocks[7].abs().max() <= 1.01 * scales[7]  # subnormal numbers have few digits
    assert not blocks[3].any()
    if not signed:
        assert (codes[values > 0] > 0).all()
