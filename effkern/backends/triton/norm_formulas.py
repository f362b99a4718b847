"""The formulas of RMSNorm, CRMSNorm and LayerNorm in Triton: those of csrc/math/*_norm.h.

Of a row two numbers are kept: rstd and, but for RMSNorm, a first one: CRMSNorm's sum, LayerNorm's
mean. Functions that take rows of a tile take them along the last axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effkern.backends.triton.numerics import larger, scalar

RMS_NORM, CRMS_NORM, LAYER_NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def rstd_of(squares, features, eps, NORM: tl.constexpr, ACC: tl.constexpr):
    """1 / sqrt(mean of squares + eps); CRMSNorm's mean is over one feature more."""
    if NORM == CRMS_NORM:
        features = features + 1
    return tl.math.rsqrt(squares / features + scalar(eps, ACC))


@triton.jit
def kept_of_rows(values, inside, features, eps, NORM: tl.constexpr, ACC: tl.constexpr):
    """The first number and rstd of each row of a tile; zeros stand outside."""
    if NORM == LAYER_NORM:
        origin = tl.sum(values, axis=1) / features
        deviation = tl.where(inside, values - origin[:, None], 0)
        # The rounding of that mean, found beside numbers that are small where all are alike.
        shift = tl.sum(deviation, axis=1) / features
        deviation = tl.where(inside, deviation - shift[:, None], 0)
        first = origin + shift
        rstd = rstd_of(tl.sum(deviation * deviation, axis=1), features, eps, NORM, ACC)
    else:
        squares = tl.sum(values * values, axis=1)
        first = squares
        if NORM == CRMS_NORM:
            first = tl.sum(values, axis=1)
            squares += first * first
        rstd = rstd_of(squares, features, eps, NORM, ACC)
    return first, rstd


@triton.jit
def variance_of(squares, plain, features):
    """The variance, from the sums about an origin of squares and of the numbers themselves."""
    shift = plain / features
    return squares / features - shift * shift


@triton.jit
def kept_of_sums(squares, plain, origin, features, eps, NORM: tl.constexpr, ACC: tl.constexpr):
    """The first number and rstd of a row from its sums about the origin."""
    if NORM == LAYER_NORM:
        variance = larger(variance_of(squares, plain, features), scalar(0.0, ACC))
        first = origin + plain / features
        rstd = tl.math.rsqrt(variance + scalar(eps, ACC))
    else:
        first = plain
        if NORM == CRMS_NORM:
            squares += plain * plain
        rstd = rstd_of(squares, features, eps, NORM, ACC)
    return first, rstd


@triton.jit
def centred(values, first, NORM: tl.constexpr):
    """What rstd is multiplied with."""
    if NORM == LAYER_NORM:
        values = values - first
    return values


@triton.jit
def restored(
    y,
    weight,
    bias,
    first,
    rstd,
    LEAST: tl.constexpr,
    LEAST_BESIDE_BIAS: tl.constexpr,
    NORM: tl.constexpr,
):
    """What was normalised, from y; NaN where the weight is smaller than the least. Weight and bias
    are None where there are none.
    """
    if weight is not None:
        enough = tl.abs(weight) >= LEAST
        if bias is not None:
            enough = enough & (tl.abs(weight) >= tl.abs(bias) * LEAST_BESIDE_BIAS)
            y = y - bias
        y = tl.where(enough, y / tl.where(enough, weight, 1.0), float("nan"))
    y = y / rstd
    if NORM == LAYER_NORM:
        y = y + first
    return y


@triton.jit
def projection_of(products, rstd, features, NORM: tl.constexpr):
    """The mean of g * xhat, from the sum of g * `centred`."""
    if NORM == CRMS_NORM:
        features = features + 1
    return products / features * rstd


@triton.jit
def grad_of_x(g, values, first, rstd, on_xhat, on_one, NORM: tl.constexpr):
    """The gradient of x from g = weight * grad; on_one is the mean of g, of use to LayerNorm."""
    if NORM == LAYER_NORM:
        g = g - on_one
        values = values - first
    if NORM == CRMS_NORM:
        values = values + first
    return (g - values * rstd * on_xhat) * rstd
