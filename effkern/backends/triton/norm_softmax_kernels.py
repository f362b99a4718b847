"""NormSoftmax's kernels in Triton: the formula of csrc/math/norm_softmax.h.

Rows that fit into one program's registers are read once. Longer ones are read three times: for the
deviation, which all exponentials need, for the sums over those, and for the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effkern.backends.triton.numerics import (
    exponential,
    larger,
    quotient,
    root,
    scalar,
    to_accumulator,
    to_storage,
)
from effkern.backends.triton.rows import row_offset

#: How entries are hidden, and what is added to the others: MaskKind of csrc/common/norm_softmax.h.
NO_MASK, BOOLEAN, ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def temperature(tau, tau_value, ACC: tl.constexpr):
    """Tau: the number at the address, or without one the value."""
    if tau is None:
        number = scalar(tau_value, ACC)
    else:
        number = tl.load(tau)
    return number


@triton.jit
def load_x(x, offset, inside, ACC: tl.constexpr):
    """Numbers in the accumulation type; 0 outside."""
    return to_accumulator(tl.load(x + offset, mask=inside, other=0), ACC)


@triton.jit
def load_mask(mask, offset, inside, hidden, KIND: tl.constexpr, ACC: tl.constexpr):
    """Which entries are inside and visible, and what is added to their logits."""
    visible = inside
    bias = scalar(0.0, ACC)
    if KIND == BOOLEAN:
        visible = inside & (tl.load(mask + offset, mask=inside, other=0) != 0)
    if KIND == ADDITIVE:
        bias = to_accumulator(tl.load(mask + offset, mask=inside, other=0), ACC)
        visible = inside & ~(bias <= scalar(hidden, ACC))
        bias = tl.where(visible, bias, 0)
    return visible, bias


@triton.jit
def divisor_of(squares, count, tau, eps):
    """What a row is divided by; whether it is the deviation, and whether it is tau."""
    sigma = root(quotient(squares, count))
    tau = count * 0 + tau  # one for each row: the interpreter combines no block with a scalar bool
    is_small = (count >= 2) & (sigma < eps)
    counts_as_tau = (count < 2) | (sigma >= tau)
    is_sigma = ~is_small & ~counts_as_tau
    is_tau = ~is_small & counts_as_tau & (tau > eps)
    divisor = tl.where(is_sigma, sigma, tl.where(is_tau, tau, eps))
    return divisor, is_sigma, is_tau


@triton.jit
def centred_rows(values, visible):
    """The deviations from each row's mean, the sum of their squares and how many there are."""
    values = tl.where(visible, values, 0)
    count = tl.sum(visible.to(values.dtype), axis=1)
    mean = tl.sum(values, axis=1) / count
    c = tl.where(visible, values - mean[:, None], 0)
    # The rounding of that mean, found beside numbers that are small where all are alike.
    shift = tl.sum(c, axis=1) / count
    c = tl.where(visible, c - shift[:, None], 0)
    return c, tl.sum(c * c, axis=1), count


@triton.jit
def exponentials_of_rows(c, bias, visible, inverse):
    """The distribution up to a factor; 0 at hidden entries."""
    z = tl.where(visible, c * inverse[:, None] + bias, float("-inf"))
    top = tl.max(z, axis=1)
    return tl.where(visible, exponential(z - top[:, None]), 0)


@triton.jit
def of_along(along, count, squares, is_sigma, is_tau, tau):
    """From sum(dz c): sum(dz c) / sum(c^2) or 0, and tau's share; zeros in a hidden row."""
    along = tl.where(count > 0, along, 0)
    on_c = tl.where(is_sigma, along / squares, 0)
    return on_c, tl.where(is_tau, -along / (tau * tau), 0)


@triton.jit
def norm_softmax_forward_kernel(
    x,
    mask,
    tau,
    y,
    x_rows,
    mask_rows,
    y_rows,
    x_stride,
    mask_stride,
    y_stride,
    rows,
    features,
    tau_value: tl.float64,
    eps: tl.float64,
    hidden: tl.float64,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows that fit, ROWS at a time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    inside = (row < rows)[:, None] & (column < features)[None, :]
    values = load_x(x, row_offset(row, x_rows)[:, None] + column[None, :] * x_stride, inside, ACC)
    place = 0
    if KIND != NO_MASK:
        place = row_offset(row, mask_rows)[:, None] + column[None, :] * mask_stride
    visible, bias = load_mask(mask, place, inside, hidden, KIND, ACC)
    c, squares, count = centred_rows(values, visible)
    divisor, _, _ = divisor_of(squares, count, temperature(tau, tau_value, ACC), scalar(eps, ACC))
    e = exponentials_of_rows(c, bias, visible, quotient(1.0, divisor))
    factor = tl.where(count > 0, quotient(1.0, tl.sum(e, axis=1)), 0)
    out = row_offset(row, y_rows)[:, None] + column[None, :] * y_stride
    tl.store(y + out, to_storage(e * factor[:, None], y.dtype.element_ty), mask=inside)


@triton.jit
def norm_softmax_backward_kernel(
    grad,
    x,
    mask,
    tau,
    grad_x,
    grad_tau,
    grad_rows,
    x_rows,
    mask_rows,
    grad_x_rows,
    grad_stride,
    x_stride,
    mask_stride,
    grad_x_stride,
    rows,
    features,
    tau_value: tl.float64,
    eps: tl.float64,
    hidden: tl.float64,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows that fit, ROWS at a time; grad_x and grad_tau are None where not wanted."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    inside = (row < rows)[:, None] & (column < features)[None, :]
    values = load_x(x, row_offset(row, x_rows)[:, None] + column[None, :] * x_stride, inside, ACC)
    place = row_offset(row, grad_rows)[:, None] + column[None, :] * grad_stride
    g = load_x(grad, place, inside, ACC)
    if KIND != NO_MASK:
        place = row_offset(row, mask_rows)[:, None] + column[None, :] * mask_stride
    visible, bias = load_mask(mask, place, inside, hidden, KIND, ACC)
    g = tl.where(visible, g, 0)
    c, squares, count = centred_rows(values, visible)
    number = temperature(tau, tau_value, ACC)
    divisor, is_sigma, is_tau = divisor_of(squares, count, number, scalar(eps, ACC))
    e = exponentials_of_rows(c, bias, visible, quotient(1.0, divisor))
    factor = tl.where(count > 0, quotient(1.0, tl.sum(e, axis=1)), 0)
    mean_g = tl.sum(e * g, axis=1) * factor
    dz = e * factor[:, None] * (g - mean_g[:, None])
    along = tl.sum(dz * c, axis=1)
    on_c, of_tau = of_along(along, count, squares, is_sigma, is_tau, number)
    if grad_tau is not None:
        tl.store(grad_tau + row, of_tau, mask=row < rows)
    if grad_x is not None:
        dx = (dz - c * on_c[:, None]) * quotient(1.0, divisor)[:, None]
        out = row_offset(row, grad_x_rows)[:, None] + column[None, :] * grad_x_stride
        tl.store(grad_x + out, to_storage(dx, grad_x.dtype.element_ty), mask=inside)


# ---- rows that do not fit: a program reads one a block at a time ----


@triton.jit
def find_long(
    x_row,
    mask_row,
    x_stride,
    mask_stride,
    features,
    hidden,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean of a row's visible entries, the sum of squares about it, and their count."""
    counts = tl.zeros((BLOCK,), ACC)
    means = tl.zeros((BLOCK,), ACC)
    squares = tl.zeros((BLOCK,), ACC)
    for start in range(0, features, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = column < features
        visible, _ = load_mask(mask_row, column * mask_stride, inside, hidden, KIND, ACC)
        values = load_x(x_row, column * x_stride, inside, ACC)
        counts += visible.to(ACC)
        distance = tl.where(visible, values - means, 0)
        means += distance / tl.maximum(counts, 1)
        squares += tl.where(visible, distance * (values - means), 0)
    count = tl.sum(counts, axis=0)
    mean = tl.sum(counts * means, axis=0) / count
    distance = tl.where(counts > 0, means - mean, 0)
    shift = tl.sum(counts * distance, axis=0) / count
    distance = tl.where(counts > 0, distance - shift, 0)
    return mean + shift, tl.sum(squares + counts * distance * distance, axis=0), count


@triton.jit
def raised(top, z, visible):
    """The larger of top and what is visible of z, and the factor of sums that were taken below."""
    new = tl.where(visible, larger(top, z), top)
    return new, tl.where(new == top, 1, exponential(top - new))


@triton.jit
def norm_softmax_forward_long_kernel(
    x,
    mask,
    tau,
    y,
    x_rows,
    mask_rows,
    y_rows,
    x_stride,
    mask_stride,
    y_stride,
    rows,
    features,
    tau_value: tl.float64,
    eps: tl.float64,
    hidden: tl.float64,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row that does not fit."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x + row_offset(row, x_rows)
    y_row = y + row_offset(row, y_rows)
    mask_row = mask
    if KIND != NO_MASK:
        mask_row = mask + row_offset(row, mask_rows)
    mean, squares, count = find_long(
        x_row, mask_row, x_stride, mask_stride, features, hidden, KIND, ACC, BLOCK
    )
    number = temperature(tau, tau_value, ACC)
    divisor, _, _ = divisor_of(squares, count, number, scalar(eps, ACC))
    tops = tl.full((BLOCK,), float("-inf"), ACC)
    sums = tl.zeros((BLOCK,), ACC)
    for start in range(0, features, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = column < features
        visible, bias = load_mask(mask_row, column * mask_stride, inside, hidden, KIND, ACC)
        c = load_x(x_row, column * x_stride, inside, ACC) - mean
        z = quotient(c, divisor) + bias
        tops, factor = raised(tops, z, visible)
        sums = sums * factor + tl.where(visible, exponential(z - tops), 0)
    top = tl.max(tops, axis=0)
    total = tl.sum(tl.where(tops == top, sums, sums * exponential(tops - top)), axis=0)
    factor = tl.where(count > 0, quotient(1.0, total), 0)
    for start in range(0, features, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = column < features
        visible, bias = load_mask(mask_row, column * mask_stride, inside, hidden, KIND, ACC)
        c = load_x(x_row, column * x_stride, inside, ACC) - mean
        z = quotient(c, divisor) + bias
        e = tl.where(visible, exponential(z - top) * factor, 0)
        tl.store(y_row + column * y_stride, to_storage(e, y.dtype.element_ty), mask=inside)


@triton.jit
def norm_softmax_backward_long_kernel(
    grad,
    x,
    mask,
    tau,
    grad_x,
    grad_tau,
    grad_rows,
    x_rows,
    mask_rows,
    grad_x_rows,
    grad_stride,
    x_stride,
    mask_stride,
    grad_x_stride,
    rows,
    features,
    tau_value: tl.float64,
    eps: tl.float64,
    hidden: tl.float64,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row that does not fit."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x + row_offset(row, x_rows)
    grad_row = grad + row_offset(row, grad_rows)
    mask_row = mask
    if KIND != NO_MASK:
        mask_row = mask + row_offset(row, mask_rows)
    mean, squares, count = find_long(
        x_row, mask_row, x_stride, mask_stride, features, hidden, KIND, ACC, BLOCK
    )
    number = temperature(tau, tau_value, ACC)
    divisor, is_sigma, is_tau = divisor_of(squares, count, number, scalar(eps, ACC))
    inverse = quotient(1.0, divisor)
    tops = tl.full((BLOCK,), float("-inf"), ACC)
    # Of each lane: the sum of weights e, the weighted means of g and c, and the sum of weight times
    # the product of their deviations. Kept so, and not as sums of products, it loses nothing where
    # one weight is far above the others, as those of a sharp distribution are.
    weights = tl.zeros((BLOCK,), ACC)
    means_g = tl.zeros((BLOCK,), ACC)
    means_c = tl.zeros((BLOCK,), ACC)
    products = tl.zeros((BLOCK,), ACC)
    for start in range(0, features, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = column < features
        visible, bias = load_mask(mask_row, column * mask_stride, inside, hidden, KIND, ACC)
        c = load_x(x_row, column * x_stride, inside, ACC) - mean
        g = load_x(grad_row, column * grad_stride, inside, ACC)
        z = quotient(c, divisor) + bias
        tops, factor = raised(tops, z, visible)
        e = tl.where(visible, exponential(z - tops), 0)
        weights *= factor
        both = weights + e
        part = tl.where(both == 0, 0, e / both)
        of_g = tl.where(visible, g - means_g, 0)
        of_c = tl.where(visible, c - means_c, 0)
        products = products * factor + of_g * of_c * (weights * part)
        means_g += of_g * part
        means_c += of_c * part
        weights = both
    top = tl.max(tops, axis=0)
    scale = tl.where(tops == top, 1, exponential(tops - top))
    weights *= scale
    factor = tl.where(count > 0, quotient(1.0, tl.sum(weights, axis=0)), 0)
    mean_g = tl.sum(weights * means_g, axis=0) * factor
    mean_c = tl.sum(weights * means_c, axis=0) * factor
    products = products * scale + weights * (means_g - mean_g) * (means_c - mean_c)
    along = tl.sum(products, axis=0) * factor
    on_c, of_tau = of_along(along, count, squares, is_sigma, is_tau, number)
    if grad_tau is not None:
        tl.store(grad_tau + row, of_tau)
    if grad_x is not None:
        out_row = grad_x + row_offset(row, grad_x_rows)
        for start in range(0, features, BLOCK):
            column = (start + tl.arange(0, BLOCK)).to(tl.int64)
            inside = column < features
            visible, bias = load_mask(mask_row, column * mask_stride, inside, hidden, KIND, ACC)
            c = load_x(x_row, column * x_stride, inside, ACC) - mean
            g = load_x(grad_row, column * grad_stride, inside, ACC)
            dz = exponential(quotient(c, divisor) + bias - top) * factor * (g - mean_g)
            dx = tl.where(visible, (dz - c * on_c) * inverse, 0)
            place = out_row + column * grad_x_stride
            tl.store(place, to_storage(dx, grad_x.dtype.element_ty), mask=inside)
