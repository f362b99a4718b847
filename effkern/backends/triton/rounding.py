"""Stochastic rounding to bfloat16: csrc/math/rounding.h, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from effkern.backends.triton.numerics import to_storage


@triton.jit
def mix_bits(x):
    """A bijective hash of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def rounding_seed(key, t):
    """For one tensor and step; key: int64."""
    seed = mix_bits(key.to(tl.uint32))
    seed = mix_bits(seed ^ (key >> 32).to(tl.uint32))
    return mix_bits(seed ^ t.to(tl.int64).to(tl.uint32))


@triton.jit
def rounded_stochastically(x, seed, start, index):
    """float32 as bfloat16, up or down with probabilities that keep the mean.

    seed: of the tensor and step. index: int64, each element's place in the tensor; start: the
    first of them, with which they share the upper 32 bits. Infinities and NaN stay.
    """
    stream = seed ^ mix_bits((tl.full((), start, tl.int64) >> 32).to(tl.uint32))
    random = mix_bits(index.to(tl.uint32) * 0x9E3779B9 + stream)
    bits = x.to(tl.uint32, bitcast=True)
    up_or_down = ((bits + (random & 0xFFFF)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, up_or_down, to_storage(x, tl.bfloat16))
