"""Optimizer state in 8 bits, in blocks of 256 values with a scale each: csrc/math/quantize.h.

Values stand in rows, one block in each.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Added to a number of at most 22 bits, it leaves no room for a fraction: the sum is rounded to the
# nearest whole number, ties to even, which then stands in its lowest bits.
_ROUNDS = tl.constexpr(12582912.0)
_LARGEST = tl.constexpr(3.4e38)


@triton.jit
def dequantized(codes, scales, SIGNED: tl.constexpr):
    """The values of rows of codes, both float32."""
    if SIGNED:
        values = codes * (scales * (1.0 / 127.0))[:, None]
    else:
        values = codes * codes * (scales * (1.0 / 65025.0))[:, None]
    return values


@triton.jit
def scales_of(values):
    """The largest magnitude of each row; NaN where there is one."""
    # As whole numbers the bits of magnitudes are in the order of those, and NaN above all.
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def quantized(values, scales, SIGNED: tl.constexpr):
    """The codes of rows of values: int8 if they may be negative, else uint8."""
    if SIGNED:
        # Finite, also where the scale is subnormal: infinity times 0 is NaN.
        factors = tl.where(scales > 0, tl.minimum(127.0 / scales, _LARGEST), 0.0)
        rounded = values * factors[:, None] + _ROUNDS
        codes = rounded.to(tl.int32, bitcast=True).to(tl.int8)
    else:
        roots = tl.sqrt(scales)  # 0 where the scale is subnormal: the GPU's root
        factors = tl.where(roots > 0, 255.0 / roots, 0.0)
        rounded = tl.sqrt(values) * factors[:, None] + _ROUNDS
        # What is not zero stays so.
        least = (values > 0).to(tl.int32)
        codes = tl.maximum(rounded.to(tl.int32, bitcast=True) & 0xFF, least).to(tl.uint8)
    return codes
