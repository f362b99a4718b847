"""NormSoftmax: the softmax of ``x / max(min(sigma, tau), eps)``, sigma the deviation of each row.

Jiang et al., "NormSoftmax: Normalizing the Input of Softmax to Accelerate and Stabilize Training"
(COINS 2023). That the deviation is the population's, the place of eps, and what masks do are this
project's choices. Everything here is differentiable, to any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype

#: A number, or a tensor of shape () on x's device.
Tau = float | Tensor


def norm_softmax(x: Tensor, mask: Tensor | None, tau: Tau, eps: float, dim: int) -> Tensor:
    """The function of that name: see `effkern.nn.functional.norm_softmax`.

    Args:
        x: of any shape, any dtype of the kernels.
        mask: broadcastable to x, boolean or of a floating dtype, or None.
        tau: the temperature.
        eps: the least divisor.
        dim: the dimension of the distributions, from 0; 0 if x has none.

    Returns:
        y like x, contiguous.
    """
    visible, bias = split_mask(mask)
    row = centred(x, visible, dim)
    y = _softmax(row.values / divisor(row.variance, row.entries, tau, eps), visible, bias, dim)
    return y.to(x.dtype).contiguous()


def backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    tau: Tau,
    eps: float,
    dim: int,
    wants_x: bool = True,
    wants_tau: bool = True,
) -> tuple[Tensor, Tensor]:
    """The gradients of `norm_softmax`.

    Args:
        grad: with respect to y.
        x: as `norm_softmax` had it; so are mask, tau, eps and dim.
        mask: so.
        tau: so.
        eps: so.
        dim: so.
        wants_x: whether grad_x is computed.
        wants_tau: whether grad_tau is computed.

    Returns:
        grad_x like x; each row's share of tau's gradient, in one dimension and the accumulation
        dtype. An empty tensor for one that is not wanted.
    """
    visible, bias = split_mask(mask)
    c, variance, count = centred(x, visible, dim)
    divided_by = divisor(variance, count, tau, eps)
    is_sigma, is_tau = branches(variance, count, tau, eps)
    y = _softmax(c / divided_by, visible, bias, dim)
    dz = grad_of_logits(grad.to(c.dtype), y, dim)
    along = (dz * c).sum(dim, keepdim=True)
    grad_x, grad_tau = x.new_empty(0), c.new_empty(0)
    if wants_x:
        squares = torch.where(is_sigma, variance * count, 1)
        of_sigma = torch.where(is_sigma, c * (along / squares), 0)
        grad_x = ((dz - of_sigma) / divided_by).to(x.dtype).contiguous()
    if wants_tau:
        grad_tau = torch.where(is_tau, -along / tau**2, 0).flatten()
    return grad_x, grad_tau


def grad_of_logits(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    """The gradient of what the softmax y is of; hidden entries of grad may be anything."""
    grad = torch.where(y == 0, 0, grad)
    return y * (grad - (y * grad).sum(dim, keepdim=True))


def split_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which entries take part, and what is added to them; None where a mask does not say.

    An additive mask hides what is at or below half its dtype's lowest finite number, and adds
    nothing there.
    """
    if mask is None:
        return None, None
    if mask.dtype == torch.bool:
        return mask, None
    visible = ~(mask <= torch.finfo(mask.dtype).min / 2)
    return visible, torch.where(visible, mask, 0)


def mask_in(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask in another dtype: what is hidden is decided in its own."""
    visible, bias = split_mask(mask)
    assert visible is not None and bias is not None
    return torch.where(visible, bias.to(dtype), float("-inf"))


class Centred(NamedTuple):
    """Rows in the accumulation dtype, their means taken off.

    Attributes:
        values: like x; 0 where an entry is hidden.
        variance: of the visible entries of each row, with x's dimension of 1 for ``dim``.
        entries: how many those are; a tensor like the variance where there is a mask.
    """

    values: Tensor
    variance: Tensor
    entries: Tensor | int


def centred(x: Tensor, visible: Tensor | None, dim: int) -> Centred:
    """The deviations of visible entries from their mean.

    That the mean is taken off changes neither the softmax nor its gradient, and large numbers with
    a common offset keep their digits.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    count: Tensor | int = x.shape[dim] if x.dim() else 1
    if visible is None:
        mean = _mean(wide, count, dim)
        values = wide - mean
        # The rounding of that mean, found beside numbers that are small where all are alike.
        values = values - _mean(values, count, dim)
    else:
        visible = visible.expand(x.shape)
        wide = torch.where(visible, wide, 0)
        count = visible.sum(dim, keepdim=True)
        mean = _mean(wide, count, dim)
        values = torch.where(visible, wide - mean, 0)
        values = torch.where(visible, values - _mean(values, count, dim), 0)
    return Centred(values, _mean(values.square(), count, dim), count)


def branches(variance: Tensor, count: Tensor | int, tau: Tau, eps: float) -> tuple[Tensor, Tensor]:
    """Whether the divisor of each row is its deviation, and whether it is tau."""
    sigma = variance.detach().sqrt()
    few = torch.as_tensor(count, device=variance.device) < 2
    is_small = ~few & (sigma < eps)
    counts_as_tau = few | (sigma >= tau)
    return ~(is_small | counts_as_tau), ~is_small & counts_as_tau & torch.as_tensor(
        tau > eps, device=variance.device
    )


def divisor(variance: Tensor, count: Tensor | int, tau: Tau, eps: float) -> Tensor:
    """``max(min(sigma, tau), eps)``, where sigma counts as tau among fewer than two entries.

    Its gradient goes to the variance where eps <= sigma < tau, to tau where sigma >= tau > eps,
    and nowhere where sigma < eps.

    Args:
        variance: of each row.
        count: how many entries of each row are visible.
        tau: the temperature.
        eps: the least divisor.
    """
    is_sigma, is_tau = branches(variance, count, tau, eps)
    tau = torch.as_tensor(tau, dtype=variance.dtype, device=variance.device)
    # Where the root is not used its argument is one: the gradient of a root at zero is infinite.
    root = torch.where(is_sigma, variance, 1).sqrt()
    return torch.where(is_sigma, root, torch.where(is_tau, tau, eps))


def norm_softmax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tau: Tau,
    eps: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The function of that name: see `effkern.nn.functional.norm_softmax_cross_entropy`."""
    row = centred(logits, None, min(1, logits.dim() - 1))
    z = row.values / divisor(row.variance, row.entries, tau, eps)
    if target.is_floating_point():
        target = target.to(z.dtype)
    loss = F.cross_entropy(
        z,
        target,
        None if weight is None else weight.to(z.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.to(logits.dtype)


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tau: Tau,
    eps: float,
    label_smoothing: float,
    ignore_index: int,
    scale: Tensor | None,
    wants_logits: bool,
    wants_tau: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss, and ``scale`` times its gradients.

    Args:
        logits: shape ``(N, C)``.
        target: class indices of shape ``(N,)``, or probabilities like logits.
        weight: of each class, or None.
        tau: the temperature.
        eps: the least divisor.
        label_smoothing: as PyTorch has it.
        ignore_index: of rows that have no loss.
        scale: of each row, or one for all.
        wants_logits: whether the gradient of the logits is computed.
        wants_tau: whether the shares of tau's gradient are.

    Returns:
        The losses and tau's shares, of shape ``(N,)`` in the accumulation dtype, with the logits'
        gradient between them; an empty tensor for a gradient that is not wanted.
    """
    c, variance, count = centred(logits, None, 1)
    divided_by = divisor(variance, count, tau, eps)
    is_sigma, is_tau = branches(variance, count, tau, eps)
    log_p = torch.log_softmax(c / divided_by, 1)
    a = _coefficients(target, weight, label_smoothing, ignore_index, log_p)
    loss = -(a * log_p).sum(1)
    grad, grad_tau = logits.new_empty(0), c.new_empty(0)
    if scale is None:
        return loss, grad, grad_tau
    if not target.is_floating_point():
        scale = torch.where(
            target == ignore_index, 0, scale
        )  # that of a mean of no rows is infinite
    dz = log_p.exp() * a.sum(1, keepdim=True) - a
    along = (dz * c).sum(1, keepdim=True)
    if wants_logits:
        squares = torch.where(is_sigma, variance * count, 1)
        of_sigma = torch.where(is_sigma, c * along / squares, 0)
        grad = ((dz - of_sigma) / divided_by * scale.reshape(-1, 1)).to(logits.dtype)
    if wants_tau:
        grad_tau = torch.where(is_tau, -along / tau**2, 0).flatten() * scale
    return loss, grad, grad_tau


def _coefficients(
    target: Tensor, weight: Tensor | None, smoothing: float, ignore_index: int, like: Tensor
) -> Tensor:
    """What the loss multiplies the logarithms by, less its sign; zeros in ignored rows."""
    a = torch.full_like(like, smoothing / max(like.shape[1], 1))
    if target.is_floating_point():
        a = a + target.to(like.dtype) * (1 - smoothing)
        return a if weight is None else a * weight
    ignored = (target == ignore_index)[:, None]
    index = torch.where(ignored, 0, target[:, None])
    a = a.scatter_add(1, index, torch.full_like(like[:, :1], 1 - smoothing))
    return torch.where(ignored, 0, a if weight is None else a * weight)


def _softmax(z: Tensor, visible: Tensor | None, bias: Tensor | None, dim: int) -> Tensor:
    """The softmax over visible entries of z + bias; rows without one are zeros."""
    if bias is not None:
        z = z + bias.to(z.dtype)
    if visible is None:
        return torch.softmax(z, dim)
    # A row without a visible entry keeps zeros in z, so that its gradients are zeros too.
    visible = visible.expand(z.shape)
    hidden = ~visible & visible.any(dim, keepdim=True)
    y = torch.softmax(torch.where(hidden, float("-inf"), torch.where(visible, z, 0)), dim)
    return torch.where(visible, y, 0)


def _mean(values: Tensor, count: Tensor | int, dim: int) -> Tensor:
    """The mean over ``count`` entries, of which the others are zeros; 0 where there is none."""
    least = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    return values.sum(dim, keepdim=True) / least
