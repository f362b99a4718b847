"""RMSNorm in Triton, forward and backward. The formulas are those of csrc/math/rms_norm.h.

Rows that fit into one program's registers are read once; longer ones twice. Sums are taken in a
fixed order over a partition of the rows that depends on the shape alone, so that results repeat bit
for bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from effkern.backends.triton.checks import check_device, check_dtype, check_like
from effkern.backends.triton.launch import COMPILER_OPTIONS, device_guard
from effkern.backends.triton.numerics import (
    TRITON_DTYPE,
    accumulation_dtype,
    scalar,
    to_accumulator,
    to_storage,
)
from effkern.backends.triton.rows import as_rows, optional_rows, row_offset

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


@triton.jit
def rms_norm_rstd(sum_of_squares, features, eps, ACC: tl.constexpr):
    """1 / sqrt(mean of squares + eps)."""
    return tl.math.rsqrt(sum_of_squares / features + scalar(eps, ACC))


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
def load_weight(weight, column, features, ACC: tl.constexpr):
    """The weights of these columns, in the accumulation type."""
    return to_accumulator(tl.load(weight + column, mask=column < features, other=0), ACC)


@triton.jit
def rms_norm_forward_kernel(
    x,
    residual,
    weight,
    y,
    total,
    rstd,
    x_rows,
    residual_rows,
    rows,
    features,
    eps: tl.float64,
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
    r = rms_norm_rstd(tl.sum(values * values, axis=1), features, eps, ACC)
    tl.store(rstd + row, r, mask=row < rows)
    values = values * r[:, None]
    if weight is not None:
        values = values * load_weight(weight, column, features, ACC)[None, :]
    tl.store(y + out, to_storage(values, y.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_forward_long_kernel(
    x,
    residual,
    weight,
    y,
    total,
    rstd,
    x_rows,
    residual_rows,
    features,
    eps: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row that does not fit: read for its statistics, and again for its output."""
    row = tl.program_id(0).to(tl.int64)
    length = features.to(tl.int64)
    x_offset = row_offset(row, x_rows)
    residual_offset = x_offset
    if residual is not None:
        residual_offset = row_offset(row, residual_rows)

    squares = tl.zeros((BLOCK,), ACC)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = load_total(x, x_offset, residual, residual_offset, column, column < length, ACC)
        if residual is not None:
            stored = to_storage(values, total.dtype.element_ty)
            tl.store(total + row * length + column, stored, mask=column < length)
        squares += values * values
    r = rms_norm_rstd(tl.sum(squares, axis=0), features, eps, ACC)
    tl.store(rstd + row, r)

    source = x + x_offset
    if residual is not None:
        tl.debug_barrier()  # other threads may have written what this one reads back
        source = total + row * length
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = to_accumulator(tl.load(source + column, mask=column < length, other=0), ACC) * r
        if weight is not None:
            values = values * load_weight(weight, column, length, ACC)
        tl.store(
            y + row * length + column, to_storage(values, y.dtype.element_ty), mask=column < length
        )


@triton.jit
def rms_norm_projection_kernel(
    grad,
    x,
    weight,
    rstd,
    projection,
    grad_rows,
    x_rows,
    features,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """mean(weight * grad * x * rstd) of one row that does not fit: the first of its two reads."""
    row = tl.program_id(0).to(tl.int64)
    length = features.to(tl.int64)
    grad_row = grad + row_offset(row, grad_rows)
    x_row = x + row_offset(row, x_rows)
    products = tl.zeros((BLOCK,), ACC)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        g = to_accumulator(tl.load(grad_row + column, mask=column < length, other=0), ACC)
        if weight is not None:
            g = g * load_weight(weight, column, length, ACC)
        products += g * to_accumulator(tl.load(x_row + column, mask=column < length, other=0), ACC)
    tl.store(projection + row, tl.sum(products, axis=0) / features * tl.load(rstd + row))


@triton.jit
def rms_norm_backward_kernel(
    grad,
    grad_total,
    x,
    weight,
    rstd,
    projection,
    grad_x,
    partials,
    grad_rows,
    grad_total_rows,
    x_rows,
    rows,
    features,
    stretch_rows,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stretch of rows, ROWS at a time, and a block of their columns: all, where a row fits.

    projection: None where a row fits; else what rms_norm_projection_kernel wrote, and this is the
    second read. grad_x: None where it is not wanted. partials: None, or (stretches, features).
    """
    stretch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin = stretch * stretch_rows
    end = tl.minimum(begin + stretch_rows, rows)
    if weight is not None:
        weight_values = load_weight(weight, column, features, ACC)[None, :]
    if partials is not None:
        partial = tl.zeros((ROWS, BLOCK), ACC)

    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < features)[None, :]
        grad_offset = row_offset(row, grad_rows)[:, None] + column[None, :]
        x_offset = row_offset(row, x_rows)[:, None] + column[None, :]
        g = to_accumulator(tl.load(grad + grad_offset, mask=inside, other=0), ACC)
        values = to_accumulator(tl.load(x + x_offset, mask=inside, other=0), ACC)
        r = tl.load(rstd + row, mask=row < end, other=0)
        if partials is not None:
            partial += g * (values * r[:, None])
        if grad_x is not None:
            if weight is not None:
                g = g * weight_values
            if projection is None:
                p = tl.sum(g * values, axis=1) / features * r
            else:
                p = tl.load(projection + row, mask=row < end, other=0)
            g = (g - values * r[:, None] * p[:, None]) * r[:, None]
            if grad_total is not None:
                offset = row_offset(row, grad_total_rows)[:, None] + column[None, :]
                g += to_accumulator(tl.load(grad_total + offset, mask=inside, other=0), ACC)
            out = row[:, None] * features + column[None, :]
            tl.store(grad_x + out, to_storage(g, grad_x.dtype.element_ty), mask=inside)

    if partials is not None:
        tl.store(
            partials + stretch * features + column, tl.sum(partial, axis=0), mask=column < features
        )


@triton.jit
def rms_norm_grad_weight_kernel(
    partials, grad_weight, stretches, features, COLUMNS: tl.constexpr, STRETCHES: tl.constexpr
):
    """The sum of all partial weight gradients, for COLUMNS columns."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((STRETCHES, COLUMNS), partials.dtype.element_ty)
    for start in range(0, stretches, STRETCHES):
        stretch = start + tl.arange(0, STRETCHES).to(tl.int64)
        inside = (stretch < stretches)[:, None] & (column < features)[None, :]
        total += tl.load(
            partials + stretch[:, None] * features + column[None, :], mask=inside, other=0
        )
    values = to_storage(tl.sum(total, axis=0), grad_weight.dtype.element_ty)
    tl.store(grad_weight + column, values, mask=column < features)


def rms_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    dims: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``effkern::_rms_norm_forward`` and ``_add_rms_norm_forward``: y, total and rstd.

    Without a residual, total is empty.
    """
    rows, features, acc = _extents(x, dims)
    if residual is not None:
        check_like(residual, "residual", x, "x")
    _check_weight(weight, features, x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y.new_empty(0) if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[: x.dim() - dims], dtype=acc, device=x.device)
    with device_guard(x, "_rms_norm_forward"):
        if not y.numel():
            return y, total, rstd.fill_(math.nan)  # the mean of nothing
        x, x_rows = as_rows(x, dims)
        residual, residual_rows = optional_rows(residual, dims)
        weight = None if weight is None else weight.contiguous()
        tile = tile_for(features, acc, FORWARD_ROW_BYTES)
        arguments = (x, residual, weight, y, total, rstd, x_rows, residual_rows)
        options = {
            "ACC": TRITON_DTYPE[acc],
            "BLOCK": tile.block,
            "num_warps": tile.warps,
            **COMPILER_OPTIONS,
        }
        if tile.columns == 1:
            grid = (triton.cdiv(rows, tile.rows),)
            rms_norm_forward_kernel[grid](
                *arguments, rows, features, eps, ROWS=tile.rows, **options
            )
        else:
            rms_norm_forward_long_kernel[(rows,)](*arguments, features, eps, **options)
    return y, total, rstd


def rms_norm_backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    dims: int,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``effkern::_rms_norm_backward``: the gradients of x and weight, empty where not wanted."""
    rows, features, acc = _extents(x, dims)
    check_like(grad, "grad", x, "x")
    if grad_total is not None:
        check_like(grad_total, "grad_total", x, "x")
    _check_weight(weight, features, x)
    check_device(rstd, "rstd", x, "x")
    if rstd.dtype != acc or rstd.numel() != rows:
        raise RuntimeError(
            "rstd must be what the forward returned for x: one accumulation number a row"
        )
    grad_x = torch.empty(x.shape if wants_x else 0, dtype=x.dtype, device=x.device)
    grad_weight = x.new_empty(0)
    if wants_weight:
        if weight is None:
            raise RuntimeError("wants_weight is true; without a weight it must be false")
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    with device_guard(x, "_rms_norm_backward"):
        if not rows or not features:
            return grad_x, grad_weight.zero_()
        if not wants_x and not wants_weight:
            return grad_x, grad_weight
        grad, grad_rows = as_rows(grad, dims)
        grad_total, grad_total_rows = optional_rows(grad_total, dims)
        x, x_rows = as_rows(x, dims)
        rstd = rstd.contiguous()
        weight = None if weight is None else weight.contiguous()
        tile = tile_for(features, acc, BACKWARD_ROW_BYTES)
        options = {
            "ACC": TRITON_DTYPE[acc],
            "BLOCK": tile.block,
            "num_warps": tile.warps,
            **COMPILER_OPTIONS,
        }

        projection = None
        if tile.columns > 1 and wants_x:
            projection = torch.empty_like(rstd)
            rms_norm_projection_kernel[(rows,)](
                grad, x, weight, rstd, projection, grad_rows, x_rows, features, **options
            )
        stretch_rows = _stretch_rows(rows, tile.rows)
        stretches = triton.cdiv(rows, stretch_rows)
        partials = (
            torch.empty(stretches, features, dtype=acc, device=x.device) if wants_weight else None
        )
        rms_norm_backward_kernel[(stretches, tile.columns)](
            grad,
            grad_total,
            x,
            weight,
            rstd,
            projection,
            grad_x if wants_x else None,
            partials,
            grad_rows,
            grad_total_rows,
            x_rows,
            rows,
            features,
            stretch_rows,
            ROWS=tile.rows,
            **options,
        )
        if partials is not None:
            at_a_time = min(triton.next_power_of_2(stretches), REDUCE_STRETCHES)
            columns = TILE // at_a_time
            rms_norm_grad_weight_kernel[(triton.cdiv(features, columns),)](
                partials,
                grad_weight,
                stretches,
                features,
                COLUMNS=columns,
                STRETCHES=at_a_time,
                **COMPILER_OPTIONS,
            )
    return grad_x, grad_weight


def _extents(x: torch.Tensor, dims: int) -> tuple[int, int, torch.dtype]:
    """The number of rows, the number of features, and the accumulation type."""
    check_dtype(x, "x")
    if not 0 < dims <= x.dim():
        raise RuntimeError(f"dims is {dims}; it must be from 1 to the {x.dim()} dimensions of x")
    split = x.dim() - dims
    return math.prod(x.shape[:split]), math.prod(x.shape[split:]), accumulation_dtype(x.dtype)


def _check_weight(weight: torch.Tensor | None, features: int, x: torch.Tensor) -> None:
    if weight is None:
        return
    check_dtype(weight, "weight")
    check_device(weight, "weight", x, "x")
    if weight.numel() != features:
        raise RuntimeError(
            f"weight has {weight.numel()} elements; "
            f"it must have the {features} of the normalised dimensions"
        )


def _stretch_rows(rows: int, tile_rows: int) -> int:
    """The length of a stretch of rows, a multiple of the tile's. Depends on the shape alone."""
    return triton.cdiv(max(triton.cdiv(rows, STRETCHES), STRETCH_ROWS), tile_rows) * tile_rows
