"""The ops of RMSNorm, CRMSNorm and LayerNorm in Triton: checks, tiles and launches."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from effkern.backends.reference.norm import LEAST_BESIDE_BIAS, LEAST_WEIGHT
from effkern.backends.triton.checks import check_device, check_dtype, check_like
from effkern.backends.triton.launch import COMPILER_OPTIONS, device_guard
from effkern.backends.triton.norm_formulas import CRMS_NORM, LAYER_NORM, RMS_NORM
from effkern.backends.triton.norm_kernels import (
    BACKWARD_ROW_BYTES,
    FORWARD_ROW_BYTES,
    REDUCE_STRETCHES,
    STRETCH_ROWS,
    STRETCHES,
    TILE,
    norm_backward_kernel,
    norm_forward_kernel,
    norm_forward_long_kernel,
    norm_projection_kernel,
    norm_sum_shares_kernel,
    tile_for,
)
from effkern.backends.triton.numerics import TRITON_DTYPE, accumulation_dtype
from effkern.backends.triton.rows import as_rows, optional_rows


class Norm(NamedTuple):
    """One norm.

    Attributes:
        name: of its ops.
        code: which formula the kernels use.
        numbers: how many a row are kept for the backward pass.
    """

    name: str
    code: tl.constexpr
    numbers: int


RMS = Norm("rms_norm", RMS_NORM, 1)
CRMS = Norm("crms_norm", CRMS_NORM, 2)
LAYER = Norm("layer_norm", LAYER_NORM, 2)


def _forward(
    norm: Norm,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dims: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, features, acc = _extents(x, dims)
    if residual is not None:
        check_like(residual, "residual", x, "x")
    _check_parameters(weight, bias, features, x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y.new_empty(0) if residual is None else torch.empty_like(y)
    shape = x.shape[: x.dim() - dims]
    statistics = torch.empty(
        shape if norm.numbers == 1 else (norm.numbers, *shape), dtype=acc, device=x.device
    )
    with device_guard(x, f"_{norm.name}_forward"):
        if not y.numel():
            return y, total, statistics.fill_(math.nan)  # the mean of nothing
        x, x_rows = as_rows(x, dims)
        residual, residual_rows = optional_rows(residual, dims)
        weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
        tile = tile_for(features, acc, FORWARD_ROW_BYTES)
        arguments = (x, residual, weight, bias, y, total, statistics, x_rows, residual_rows)
        options = {
            "NORM": norm.code,
            "ACC": TRITON_DTYPE[acc],
            "BLOCK": tile.block,
            "num_warps": tile.warps,
            **COMPILER_OPTIONS,
        }
        if tile.columns == 1:
            grid = (triton.cdiv(rows, tile.rows),)
            norm_forward_kernel[grid](*arguments, rows, features, eps, ROWS=tile.rows, **options)
        else:
            norm_forward_long_kernel[(rows,)](*arguments, rows, features, eps, **options)
    return y, total, statistics


def _backward(
    norm: Norm,
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: torch.Tensor,
    dims: int,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
    x_is_y: bool = False,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, features, acc = _extents(x, dims)
    check_like(grad, "grad", x, "x")
    if grad_total is not None:
        check_like(grad_total, "grad_total", x, "x")
    _check_parameters(weight, bias, features, x)
    check_device(statistics, "statistics", x, "x")
    if statistics.dtype != acc or statistics.numel() != norm.numbers * rows:
        raise RuntimeError(
            "statistics must be what the forward returned for x: "
            f"{norm.numbers} accumulation numbers a row"
        )
    grad_x = torch.empty(x.shape if wants_x else 0, dtype=x.dtype, device=x.device)
    if (wants_weight or wants_bias) and weight is None:
        raise RuntimeError("a gradient of a parameter is wanted; without a weight there is none")
    grad_weight, grad_bias = (
        torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
        if wanted and weight is not None
        else x.new_empty(0)
        for wanted in (wants_weight, wants_bias)
    )
    gradients = grad_x, grad_weight, grad_bias
    sums = 2 if wants_bias else int(wants_weight)
    with device_guard(x, f"_{norm.name}_backward"):
        if not rows or not features:
            return grad_x, grad_weight.zero_(), grad_bias.zero_()
        if not wants_x and not sums:
            return gradients
        grad, grad_rows = as_rows(grad, dims)
        grad_total, grad_total_rows = optional_rows(grad_total, dims)
        x, x_rows = as_rows(x, dims)
        statistics = statistics.contiguous()
        weight = None if weight is None else weight.contiguous()
        bias = bias.contiguous() if x_is_y and bias is not None else None
        tile = tile_for(features, acc, BACKWARD_ROW_BYTES)
        options = {
            "X_IS_Y": x_is_y,
            "LEAST": LEAST_WEIGHT[x.dtype] if x_is_y else 0.0,
            "LEAST_BESIDE_BIAS": LEAST_BESIDE_BIAS[x.dtype] if x_is_y else 0.0,
            "NORM": norm.code,
            "ACC": TRITON_DTYPE[acc],
            "BLOCK": tile.block,
            "num_warps": tile.warps,
            **COMPILER_OPTIONS,
        }

        projections = None
        if tile.columns > 1 and wants_x:
            numbers = 2 if norm is LAYER else 1
            projections = torch.empty(numbers * rows, dtype=acc, device=x.device)
            norm_projection_kernel[(rows,)](
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
                **options,
            )
        stretch_rows = _stretch_rows(rows, tile.rows)
        stretches = triton.cdiv(rows, stretch_rows)
        partials = torch.empty(stretches, sums, features, dtype=acc, device=x.device)
        norm_backward_kernel[(stretches, tile.columns)](
            grad,
            grad_total,
            x,
            weight,
            bias,
            statistics,
            projections,
            grad_x if wants_x else None,
            partials if sums else None,
            grad_rows,
            grad_total_rows,
            x_rows,
            rows,
            features,
            stretch_rows,
            SUMS=sums,
            ROWS=tile.rows,
            **options,
        )
        if sums:
            at_a_time = min(triton.next_power_of_2(stretches), REDUCE_STRETCHES)
            columns = TILE // at_a_time
            norm_sum_shares_kernel[(triton.cdiv(features, columns), sums)](
                partials,
                grad_weight if wants_weight else None,
                grad_bias if wants_bias else None,
                stretches,
                features,
                SUMS=sums,
                COLUMNS=columns,
                STRETCHES=at_a_time,
                **COMPILER_OPTIONS,
            )
    return gradients


def _extents(x: torch.Tensor, dims: int) -> tuple[int, int, torch.dtype]:
    """The number of rows, the number of features, and the accumulation type."""
    check_dtype(x, "x")
    if not 0 < dims <= x.dim():
        raise RuntimeError(f"dims is {dims}; it must be from 1 to the {x.dim()} dimensions of x")
    split = x.dim() - dims
    return math.prod(x.shape[:split]), math.prod(x.shape[split:]), accumulation_dtype(x.dtype)


def _check_parameters(
    weight: torch.Tensor | None, bias: torch.Tensor | None, features: int, x: torch.Tensor
) -> None:
    _check_parameter(weight, "weight", features, x)
    _check_parameter(bias, "bias", features, x)
    if bias is not None and (weight is None or weight.dtype != bias.dtype):
        raise RuntimeError("bias needs a weight of its dtype beside it")


def _check_parameter(
    parameter: torch.Tensor | None, name: str, features: int, x: torch.Tensor
) -> None:
    if parameter is None:
        return
    check_dtype(parameter, name)
    check_device(parameter, name, x, "x")
    if parameter.numel() != features:
        raise RuntimeError(
            f"{name} has {parameter.numel()} elements; "
            f"it must have the {features} of the normalised dimensions"
        )


def _stretch_rows(rows: int, tile_rows: int) -> int:
    """The length of a stretch of rows, a multiple of the tile's. Depends on the shape alone."""
    return triton.cdiv(max(triton.cdiv(rows, STRETCHES), STRETCH_ROWS), tile_rows) * tile_rows


# The ops ``effkern::_NAME_forward`` and ``_add_NAME_forward`` are the first of each pair, which
# takes a residual or None and returns y, total (empty without a residual) and the statistics;
# ``_NAME_backward`` is the second: the gradients of x and the parameters, empty where not wanted.
rms_norm_forward, rms_norm_backward = partial(_forward, RMS), partial(_backward, RMS)
crms_norm_forward, crms_norm_backward = partial(_forward, CRMS), partial(_backward, CRMS)
layer_norm_forward, layer_norm_backward = partial(_forward, LAYER), partial(_backward, LAYER)
