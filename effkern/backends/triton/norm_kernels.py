"""The norms' kernels in Triton, forward and backward, for every formula of norm_formulas.py.

Rows that fit into one program's registers are read once; longer ones twice. Sums are taken in a
fixed order over a partition of the rows that depends on the shape alone, so that results repeat bit
for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from effkern.backends.triton.norm_formulas import (
    LAYER_NORM,
    RMS_NORM,
    centred,
    grad_of_x,
    kept_of_rows,
    kept_of_sums,
    projection_of,
    restored,
    variance_of,
)
from effkern.backends.triton.numerics import to_accumulator, to_storage
from effkern.backends.triton.rows import row_offset

#: The longest row that is read once, in bytes of the accumulation type: 16,384 float32 features
#: forward and 8,192 backward.
FORWARD_ROW_BYTES, BACKWARD_ROW_BYTES = 64 * 1024, 32 * 1024

#: Elements that a program should hold at least, so that short rows share one.
TILE = 2048

#: The backward pass cuts the rows into at most so many stretches, each with its partial weight
#: gradient, and none shorter than 8 rows: enough for every multiprocessor, few enough that the
#: partial sums cost little traffic.
STRETCHES, STRETCH_ROWS = 512, 8

#: How many stretches the last reduction takes at a time; its tile is then 32 columns wide, a line
#: of 128 bytes.
REDUCE_STRETCHES = 64


class Tile(NamedTuple):
    """A kernel holds ``rows`` x ``block`` elements at a time; ``columns`` blocks cover a row."""

    rows: int
    block: int
    warps: int
    columns: int


def tile_for(features: int, acc: torch.dtype, row_bytes: int) -> Tile:
    """The tile for rows of this length; several columns where one is longer than ``row_bytes``.

    The number of rows has no part in it: a row's result must not depend on how many there are.
    """
    longest = row_bytes // acc.itemsize
    if features > longest:
        # A loop need not hold all that fits: few registers a thread let programs share a processor.
        tile_rows, block, thread_bytes = 1, longest // 4, 32
    else:
        block = triton.next_power_of_2(features)
        tile_rows, thread_bytes = max(TILE // block, 1), 64
    warps = max(tile_rows * block * acc.itemsize // (32 * thread_bytes), 1)
    return Tile(tile_rows, block, warps, triton.cdiv(features, block))


#: A long row's sums are taken about the mean of so many features, its first ones.
ORIGIN_FEATURES = tl.constexpr(64)


@triton.jit
def load_total(x, x_offset, residual, residual_offset, column, inside, ACC: tl.constexpr):
    """What is normalised: x, or x + residual rounded to x's dtype, in the accumulation type."""
    values = to_accumulator(tl.load(x + x_offset + column, mask=inside, other=0), ACC)
    if residual is not None:
        values += to_accumulator(
            tl.load(residual + residual_offset + column, mask=inside, other=0), ACC
        )
        values = to_accumulator(to_storage(values, x.dtype.element_ty), ACC)
    return values


@triton.jit
def load_parameter(parameter, column, features, ACC: tl.constexpr):
    """The weights or biases of these columns, in the accumulation type; ones, by which may be
    divided, where there are none.
    """
    return to_accumulator(tl.load(parameter + column, mask=column < features, other=1), ACC)


@triton.jit
def store_kept(statistics, row, rows, first, rstd, mask, NORM: tl.constexpr):
    """The numbers kept of rows: all first ones stand before the others."""
    if NORM != RMS_NORM:
        tl.store(statistics + row, first, mask=mask)
        statistics += rows
    tl.store(statistics + row, rstd, mask=mask)


@triton.jit
def load_kept(statistics, row, rows, mask, NORM: tl.constexpr):
    """The first number and rstd of rows; zero and one where there are none."""
    if NORM == RMS_NORM:
        rstd = tl.load(statistics + row, mask=mask, other=1)
        first = rstd
    else:
        first = tl.load(statistics + row, mask=mask, other=0)
        rstd = tl.load(statistics + rows + row, mask=mask, other=1)
    return first, rstd


@triton.jit
def norm_forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    statistics,
    x_rows,
    residual_rows,
    rows,
    features,
    eps: tl.float64,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of at most BLOCK features: everything is read once and written once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < features)[None, :]
    x_offset = row_offset(row, x_rows)[:, None]
    residual_offset = x_offset
    if residual is not None:
        residual_offset = row_offset(row, residual_rows)[:, None]
    values = load_total(x, x_offset, residual, residual_offset, column[None, :], inside, ACC)

    out = row[:, None] * features + column[None, :]
    if residual is not None:
        tl.store(total + out, to_storage(values, total.dtype.element_ty), mask=inside)
    first, rstd = kept_of_rows(values, inside, features, eps, NORM, ACC)
    store_kept(statistics, row, rows, first, rstd, row < rows, NORM)
    values = centred(values, first[:, None], NORM) * rstd[:, None]
    if weight is not None:
        values = values * load_parameter(weight, column, features, ACC)[None, :]
    if bias is not None:
        values = values + load_parameter(bias, column, features, ACC)[None, :]
    tl.store(y + out, to_storage(values, y.dtype.element_ty), mask=inside)


@triton.jit
def long_sums(
    x,
    x_offset,
    residual,
    residual_offset,
    total,
    length,
    origin,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums over a long row about the origin: of squares, and of the numbers. Stores the sum
    with the residual at ``total``, unless that is None.
    """
    squares = tl.zeros((BLOCK,), ACC)
    plain = tl.zeros((BLOCK,), ACC)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < length
        values = load_total(x, x_offset, residual, residual_offset, column, inside, ACC)
        if total is not None:
            tl.store(total + column, to_storage(values, total.dtype.element_ty), mask=inside)
        if NORM == LAYER_NORM:
            values = tl.where(inside, values - origin, 0)
        squares += values * values
        if NORM != RMS_NORM:
            plain += values
    return tl.sum(squares, axis=0), tl.sum(plain, axis=0)


@triton.jit
def norm_forward_long_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    statistics,
    x_rows,
    residual_rows,
    rows,
    features,
    eps: tl.float64,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row that does not fit: read for its statistics, and again for its output.

    LayerNorm reads the first features once more before, and a row that begins far from its mean a
    third time.
    """
    row = tl.program_id(0).to(tl.int64)
    length = features.to(tl.int64)
    x_offset = row_offset(row, x_rows)
    residual_offset = x_offset
    total_row = None
    if residual is not None:
        residual_offset = row_offset(row, residual_rows)
        total_row = total + row * length

    origin = tl.full((), 0, ACC)
    if NORM == LAYER_NORM:
        first_columns = tl.arange(0, ORIGIN_FEATURES)
        begin = load_total(
            x, x_offset, residual, residual_offset, first_columns, first_columns < length, ACC
        )
        origin = tl.sum(begin, axis=0) / ORIGIN_FEATURES
    squares, plain = long_sums(
        x, x_offset, residual, residual_offset, total_row, length, origin, NORM, ACC, BLOCK
    )
    if NORM == LAYER_NORM:  # noqa: SIM102 - the compiler decides this one, the kernel the next
        if squares / features > 2 * variance_of(squares, plain, features):
            origin += plain / features
            squares, plain = long_sums(
                x, x_offset, residual, residual_offset, None, length, origin, NORM, ACC, BLOCK
            )
    first, rstd = kept_of_sums(squares, plain, origin, features, eps, NORM, ACC)
    store_kept(statistics, row, rows, first, rstd, None, NORM)

    source = x + x_offset
    if residual is not None:
        tl.debug_barrier()  # other threads may have written what this one reads back
        source = total_row
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = to_accumulator(tl.load(source + column, mask=column < length, other=0), ACC)
        values = centred(values, first, NORM) * rstd
        if weight is not None:
            values = values * load_parameter(weight, column, length, ACC)
        if bias is not None:
            values = values + load_parameter(bias, column, length, ACC)
        tl.store(
            y + row * length + column, to_storage(values, y.dtype.element_ty), mask=column < length
        )


@triton.jit
def norm_projection_kernel(
    grad,
    x,
    weight,
    bias,
    statistics,
    projections,
    grad_rows,
    x_rows,
    rows,
    features,
    X_IS_Y: tl.constexpr,
    LEAST: tl.constexpr,
    LEAST_BESIDE_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The means over one row that does not fit: the first of its two reads. One number a row, after
    LayerNorm's means of g.
    """
    row = tl.program_id(0).to(tl.int64)
    length = features.to(tl.int64)
    grad_row = grad + row_offset(row, grad_rows)
    x_row = x + row_offset(row, x_rows)
    first, rstd = load_kept(statistics, row, rows, row < rows, NORM)
    products = tl.zeros((BLOCK,), ACC)
    plain = tl.zeros((BLOCK,), ACC)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        g = to_accumulator(tl.load(grad_row + column, mask=column < length, other=0), ACC)
        values = to_accumulator(tl.load(x_row + column, mask=column < length, other=0), ACC)
        weight_values, bias_values = None, None
        if bias is not None:
            bias_values = load_parameter(bias, column, length, ACC)
        if weight is not None:
            weight_values = load_parameter(weight, column, length, ACC)
            g = g * weight_values
        if X_IS_Y:
            values = restored(
                values,
                weight_values,
                bias_values,
                first,
                rstd,
                LEAST,
                LEAST_BESIDE_BIAS,
                NORM,
            )
        products += g * centred(values, first, NORM)
        if NORM == LAYER_NORM:
            plain += g
    if NORM == LAYER_NORM:
        tl.store(projections + row, tl.sum(plain, axis=0) / features)
        projections += rows
    on_xhat = projection_of(tl.sum(products, axis=0), rstd, features, NORM)
    tl.store(projections + row, on_xhat)


@triton.jit
def norm_backward_kernel(
    grad,
    grad_total,
    x,
    weight,
    bias,
    statistics,
    projections,
    grad_x,
    partials,
    grad_rows,
    grad_total_rows,
    x_rows,
    rows,
    features,
    stretch_rows,
    SUMS: tl.constexpr,
    X_IS_Y: tl.constexpr,
    LEAST: tl.constexpr,
    LEAST_BESIDE_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stretch of rows, ROWS at a time, and a block of their columns: all, where a row fits.

    projections: None where a row fits; else what norm_projection_kernel wrote, and this is the
    second read. grad_x: None where it is not wanted. partials: (stretches, SUMS, features), for
    the gradients of the weight and the bias; of use where SUMS is not 0. X_IS_Y: whether x is y, of
    which what was normalised is restored; bias is None elsewhere.
    """
    stretch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin = stretch * stretch_rows
    end = tl.minimum(begin + stretch_rows, rows)
    weight_values, bias_values = None, None
    if weight is not None:
        weight_values = load_parameter(weight, column, features, ACC)[None, :]
    if bias is not None:
        bias_values = load_parameter(bias, column, features, ACC)[None, :]
    if SUMS >= 1:
        of_weight = tl.zeros((ROWS, BLOCK), ACC)
    if SUMS == 2:
        of_bias = tl.zeros((ROWS, BLOCK), ACC)

    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < features)[None, :]
        grad_offset = row_offset(row, grad_rows)[:, None] + column[None, :]
        x_offset = row_offset(row, x_rows)[:, None] + column[None, :]
        g = to_accumulator(tl.load(grad + grad_offset, mask=inside, other=0), ACC)
        values = to_accumulator(tl.load(x + x_offset, mask=inside, other=0), ACC)
        first, rstd = load_kept(statistics, row, rows, row < end, NORM)
        if X_IS_Y:
            values = restored(
                values,
                weight_values,
                bias_values,
                first[:, None],
                rstd[:, None],
                LEAST,
                LEAST_BESIDE_BIAS,
                NORM,
            )
        if SUMS >= 1:
            of_weight += g * (centred(values, first[:, None], NORM) * rstd[:, None])
        if SUMS == 2:
            of_bias += g
        if grad_x is not None:
            if weight is not None:
                g = g * weight_values
            on_one = rstd
            if projections is None:
                products = tl.sum(g * centred(values, first[:, None], NORM), axis=1)
                on_xhat = projection_of(products, rstd, features, NORM)
                if NORM == LAYER_NORM:
                    on_one = tl.sum(g, axis=1) / features
            else:
                of_row = projections + row
                if NORM == LAYER_NORM:
                    on_one = tl.load(of_row, mask=row < end, other=0)
                    of_row += rows
                on_xhat = tl.load(of_row, mask=row < end, other=0)
            g = grad_of_x(
                g,
                values,
                first[:, None],
                rstd[:, None],
                on_xhat[:, None],
                on_one[:, None],
                NORM,
            )
            if grad_total is not None:
                offset = row_offset(row, grad_total_rows)[:, None] + column[None, :]
                g += to_accumulator(tl.load(grad_total + offset, mask=inside, other=0), ACC)
            out = row[:, None] * features + column[None, :]
            tl.store(grad_x + out, to_storage(g, grad_x.dtype.element_ty), mask=inside)

    if SUMS >= 1:
        share = partials + stretch * SUMS * features + column
        tl.store(share, tl.sum(of_weight, axis=0), mask=column < features)
        if SUMS == 2:
            tl.store(share + features, tl.sum(of_bias, axis=0), mask=column < features)


@triton.jit
def norm_sum_shares_kernel(
    partials,
    grad_weight,
    grad_bias,
    stretches,
    features,
    SUMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    """The sum of all partial gradients, for COLUMNS columns of the weight, or of the bias; a
    gradient that is not wanted is None.
    """
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    of_bias = tl.program_id(1)
    total = tl.zeros((STRETCHES, COLUMNS), partials.dtype.element_ty)
    for start in range(0, stretches, STRETCHES):
        stretch = start + tl.arange(0, STRETCHES).to(tl.int64)
        inside = (stretch < stretches)[:, None] & (column < features)[None, :]
        share = (stretch * SUMS + of_bias)[:, None] * features
        total += tl.load(partials + share + column[None, :], mask=inside, other=0)
    sums = tl.sum(total, axis=0)
    if grad_weight is not None:  # noqa: SIM102 - as above
        if of_bias == 0:
            values = to_storage(sums, grad_weight.dtype.element_ty)
            tl.store(grad_weight + column, values, mask=column < features)
    if grad_bias is not None:  # noqa: SIM102
        if of_bias == 1:
            values = to_storage(sums, grad_bias.dtype.element_ty)
            tl.store(grad_bias + column, values, mask=column < features)
