"""RMSNorm, CRMSNorm and LayerNorm, with an optional residual that is added first.

A norm is a `Formula`: what it keeps of a row, and what it makes of that. `forward` and `backward`
do the rest for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype


class Formula:
    """One norm. x and g are in the accumulation dtype; g is ``grad * weight``.

    Attributes:
        numbers: how many a row are kept for the backward pass, the last of them rstd.
    """

    numbers: ClassVar[int]

    def statistics(self, x: Tensor, dims: int, eps: float) -> Tensor:
        """What is kept: of the shape of the rows, after a dimension of `numbers` where that is not
        1.
        """
        raise NotImplementedError

    def normalised(self, x: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """Xhat, like x."""
        raise NotImplementedError

    def restored(self, xhat: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """X, of which xhat is the norm."""
        return xhat / _beside_row(statistics, dims)

    def grad_x(self, g: Tensor, x: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """The gradient of x, from that of xhat."""
        raise NotImplementedError


class RmsNorm(Formula):
    """Zhang and Sennrich (2019): ``xhat = x rstd``, ``rstd = 1 / sqrt(mean(x^2) + eps)``."""

    numbers = 1

    def statistics(self, x: Tensor, dims: int, eps: float) -> Tensor:
        """See `Formula`."""
        return torch.rsqrt(x.square().mean(_last(dims)) + eps)

    def normalised(self, x: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """See `Formula`."""
        return x * _beside_row(statistics, dims)

    def grad_x(self, g: Tensor, x: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """See `Formula`."""
        rstd = _beside_row(statistics, dims)
        xhat = x * rstd
        return (g - xhat * (g * xhat).mean(_last(dims), keepdim=True)) * rstd


class CrmsNorm(Formula):
    """Jiang et al. (2023): the RMSNorm of x with one more feature, ``-sum(x)``, not in the result.

    ``xhat = x rstd``, ``rstd = 1 / sqrt((sum(x^2) + sum(x)^2) / d + eps)``, d one more than x has.
    Kept are sum(x) and rstd.
    """

    numbers = 2

    def statistics(self, x: Tensor, dims: int, eps: float) -> Tensor:
        """See `Formula`."""
        d = x.shape[-dims:].numel() + 1
        total = x.sum(_last(dims))
        squares = x.square().sum(_last(dims)) + total.square()
        return torch.stack((total, torch.rsqrt(squares / d + eps)))

    def normalised(self, x: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """See `Formula`."""
        return x * _beside_row(statistics[1], dims)

    def restored(self, xhat: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """See `Formula`."""
        return super().restored(xhat, statistics[1], dims)

    def grad_x(self, g: Tensor, x: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """See `Formula`."""
        d = x.shape[-dims:].numel() + 1
        total, rstd = (_beside_row(number, dims) for number in statistics)
        projection = (g * (x * rstd)).sum(_last(dims), keepdim=True) / d
        return (g - (x + total) * rstd * projection) * rstd


class LayerNorm(Formula):
    """Ba, Kiros and Hinton (2016): ``xhat = (x - mean(x)) rstd``, ``rstd = 1 / sqrt(var(x) + eps)``
    with the population variance. Kept are the mean and rstd.
    """

    numbers = 2

    def statistics(self, x: Tensor, dims: int, eps: float) -> Tensor:
        """See `Formula`."""
        mean = x.mean(_last(dims), keepdim=True)
        # The rounding of the first mean, found beside numbers that are small where all are alike.
        mean = mean + (x - mean).mean(_last(dims), keepdim=True)
        variance = (x - mean).square().mean(_last(dims))
        return torch.stack((mean.reshape(variance.shape), torch.rsqrt(variance + eps)))

    def normalised(self, x: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """See `Formula`."""
        mean, rstd = (_beside_row(number, dims) for number in statistics)
        return (x - mean) * rstd

    def restored(self, xhat: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """See `Formula`."""
        mean, rstd = (_beside_row(number, dims) for number in statistics)
        return mean + xhat / rstd

    def grad_x(self, g: Tensor, x: Tensor, statistics: Tensor, dims: int) -> Tensor:
        """See `Formula`."""
        rstd = _beside_row(statistics[1], dims)
        xhat = self.normalised(x, statistics, dims)
        mean_of_g = g.mean(_last(dims), keepdim=True)
        return (g - mean_of_g - xhat * (g * xhat).mean(_last(dims), keepdim=True)) * rstd


RMS_NORM, CRMS_NORM, LAYER_NORM = RmsNorm(), CrmsNorm(), LayerNorm()


def statistics(norm: Formula, x: Tensor, dims: int, eps: float) -> Tensor:
    """What the norm keeps of each row of x, in the accumulation dtype."""
    return norm.statistics(x.to(accumulation_dtype(x.dtype)), dims, eps)


def forward(
    norm: Formula,
    x: Tensor,
    residual: Tensor | None,
    parameters: Sequence[Tensor | None],
    dims: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = xhat * weight + bias``, where xhat is the norm of ``total = x + residual``.

    Args:
        norm: which.
        x: of shape ``(*rows, *normalized_shape)``.
        residual: of x's shape and dtype, or None.
        parameters: the weight and the bias; of shape ``normalized_shape``, any floating dtype, or
            None.
        dims: the number of normalised dimensions, counted from the last.
        eps: added under the root.

    Returns:
        y like x and contiguous; total likewise, or an empty tensor without a residual; the
        statistics in the accumulation dtype. They are those of total as rounded to x's dtype.
    """
    acc = accumulation_dtype(x.dtype)
    total = x if residual is None else (x + residual).contiguous()
    wide = total.to(acc)
    kept = norm.statistics(wide, dims, eps)
    y = norm.normalised(wide, kept, dims)
    weight, bias = parameters
    if weight is not None:
        y = y * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else total, kept


def backward(
    norm: Formula,
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    dims: int,
    wants_x: bool,
    wants: Sequence[bool],
    x_is_y: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `forward` with respect to x (and the residual, whose is the same) and the
    parameters.

    Args:
        norm: which.
        grad: with respect to y.
        grad_total: with respect to the returned total, or None.
        x: what was normalised: total, where there was a residual.
        weight: as forward had it.
        statistics: as forward returned them; differentiable, so that they may be a function of x.
        dims: as forward had it.
        wants_x: whether grad_x is computed.
        wants: the same for each parameter's.
        x_is_y: whether x is what forward returned as y; what was normalised is then restored from
            it, as NaN for features whose weight leaves too little of it (`leaves_enough`).
        bias: as forward had it; of use where ``x_is_y``.

    Returns:
        grad_x like x, and a gradient like weight for each parameter; an empty tensor for one that
        is not wanted.
    """
    acc = accumulation_dtype(x.dtype)
    wide, g = x.to(acc), grad.to(acc)
    if x_is_y:
        if weight is not None:
            b = weight.new_zeros(weight.shape, dtype=acc) if bias is None else bias.to(acc)
            enough = leaves_enough(weight.to(acc), b, x.dtype)
            wide = torch.where(enough, (wide - b) / weight.to(acc), torch.nan)
        wide = norm.restored(wide, statistics, dims)
    grad_x = x.new_empty(0)
    if wants_x:
        weighted = g if weight is None else g * weight.to(acc)
        result = norm.grad_x(weighted, wide, statistics, dims)
        if grad_total is not None:
            result = result + grad_total.to(acc)
        grad_x = result.to(x.dtype).contiguous()
    gradients = []
    for i, wanted in enumerate(wants):
        if not wanted or weight is None:
            gradients.append(x.new_empty(0))
            continue
        each = g * norm.normalised(wide, statistics, dims) if i == 0 else g
        rows = x.dim() - dims
        total = each.sum(list(range(rows))) if rows else each.clone()
        gradients.append(total.to(weight.dtype).contiguous())
    return grad_x, *gradients


#: Of a y's dtype, how large a weight must be beside the bias, and alone: sqrt(eps), and the
#: smallest normal number over it. The same stands in csrc/common/norm.h.
LEAST_BESIDE_BIAS = {
    torch.float32: 2.0**-11,
    torch.float64: 2.0**-26,
    torch.bfloat16: 2.0**-3,
    torch.float16: 2.0**-5,
}
LEAST_WEIGHT = {
    torch.float32: 2.0**-115,
    torch.float64: 2.0**-996,
    torch.bfloat16: 2.0**-123,
    torch.float16: 2.0**-9,
}


def leaves_enough(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """For each feature, whether ``(y - bias) / weight`` has at least half of the digits of y, whose
    dtype this is.
    """
    magnitude = weight.abs()
    enough = magnitude >= LEAST_WEIGHT[dtype]
    if bias is not None:
        enough = enough & (magnitude >= bias.abs() * LEAST_BESIDE_BIAS[dtype])
    return enough


def _last(dims: int) -> list[int]:
    return list(range(-dims, 0))


def _beside_row(numbers: Tensor, dims: int) -> Tensor:
    """A number a row, broadcast over the row."""
    return numbers.reshape(numbers.shape + (1,) * dims)
