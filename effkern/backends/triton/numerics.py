"""Numbers inside kernels: how storage becomes arithmetic and comes back.

Triton's own square roots and quotients of float32 are within 2 units in the last place; formulas
take `root` and `quotient`, which are rounded to nearest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: True where Triton's interpreter runs the kernels (TRITON_INTERPRET=1 before Python started).
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def to_accumulator(x, ACC: tl.constexpr):
    """The same numbers in the accumulation type."""
    # The interpreter's own conversion of bfloat16 is wrong for subnormal numbers.
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        y = bits.to(tl.float32, bitcast=True).to(ACC)
    else:
        y = x.to(ACC)
    return y


@triton.jit
def to_storage(x, DTYPE: tl.constexpr):
    """The numbers of DTYPE nearest to x, ties to even."""
    # The interpreter truncates to bfloat16; compiled code has an instruction that rounds.
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def scalar(value, ACC: tl.constexpr):
    """A number that came as a float64 argument, in the accumulation type."""
    return tl.full((), value, ACC)


@triton.jit
def root(x):
    """The square root, rounded to nearest."""
    if x.dtype == tl.float32:
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def quotient(a, b):
    """The quotient a / b, rounded to nearest."""
    if b.dtype == tl.float32:
        y = tl.div_rn(a, b)
    else:
        y = a / b
    return y


_LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # times a power of e's exponent it is exact
_LN2_LOW = tl.constexpr(-2.12194440054691e-4)


@triton.jit
def exponential(x):
    """The power of e of numbers up to 88; the GPU's own of float32 loses digits as x grows."""
    if x.dtype == tl.float32 and not INTERPRETED:
        x = tl.where(x < -104.0, -104.0, x)
        exponent = tl.floor(x * _LOG2E + 0.5)
        rest = (x - exponent * _LN2_HIGH) - exponent * _LN2_LOW
        y = tl.exp2(rest * _LOG2E) * tl.exp2(exponent)
    else:
        y = tl.exp(x)
    return y


@triton.jit
def larger(a, b):
    """The larger of two numbers; a NaN on either side wins, as in torch.maximum."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def sign_of(x):
    """-1, 0 or 1; 0 for NaN, as torch.sign."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
