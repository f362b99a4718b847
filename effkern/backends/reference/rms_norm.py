"""RMSNorm (Zhang and Sennrich, 2019), with an optional residual that is added first."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype


def _last(dims: int) -> list[int]:
    return list(range(-dims, 0))


def rstd(x: Tensor, dims: int, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last ``dims`` dimensions, as it is accumulated."""
    return torch.rsqrt(x.to(accumulation_dtype(x.dtype)).square().mean(_last(dims)) + eps)


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = total * rstd * weight`` with ``rstd = 1 / sqrt(mean(total^2) + eps)`` and ``total = x +
    residual``.

    Args:
        x: of shape ``(*rows, *normalized_shape)``.
        residual: of x's shape and dtype, or None.
        weight: of shape ``normalized_shape``, any floating dtype, or None.
        dims: the number of normalised dimensions, counted from the last.
        eps: added to the mean square.

    Returns:
        y like x and contiguous; total likewise, or an empty tensor without a residual; rstd of
        shape ``rows`` in the accumulation dtype. The statistics are those of total as rounded to
        x's dtype.
    """
    acc = accumulation_dtype(x.dtype)
    total = x if residual is None else (x + residual).contiguous()
    r = rstd(total, dims, eps)
    y = total.to(acc) * r.reshape(r.shape + (1,) * dims)
    if weight is not None:
        y = y * weight.to(acc)
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else total, r


def rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dims: int,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `rms_norm_forward` with respect to x (and the residual, whose is the same)
    and the weight.

    Args:
        grad: with respect to y.
        grad_total: with respect to the returned total, or None.
        x: what was normalised: total, where there was a residual.
        weight: as forward had it.
        rstd: as forward returned it; differentiable, so that it may be a function of x.
        dims: as forward had it.
        wants_x: whether grad_x is computed.
        wants_weight: whether grad_weight is computed.

    Returns:
        grad_x like x, grad_weight like weight; an empty tensor for one that is not wanted.
    """
    acc = accumulation_dtype(x.dtype)
    rstd = rstd.reshape(rstd.shape + (1,) * dims)
    xhat = x.to(acc) * rstd
    g = grad.to(acc)
    grad_x = x.new_empty(0)
    if wants_x:
        weighted = g if weight is None else g * weight.to(acc)
        wide = (weighted - xhat * (weighted * xhat).mean(_last(dims), keepdim=True)) * rstd
        if grad_total is not None:
            wide = wide + grad_total.to(acc)
        grad_x = wide.to(x.dtype).contiguous()
    grad_weight = x.new_empty(0)
    if wants_weight and weight is not None:
        rows = x.dim() - dims
        grad_weight = (g * xhat).sum(list(range(rows))) if rows else g * xhat
        grad_weight = grad_weight.to(weight.dtype).contiguous()
    return grad_x, grad_weight
