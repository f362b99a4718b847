"""NormSoftmax: the softmax of ``x / max(min(sigma, tau), eps)``, sigma the deviation of each row.

Jiang et al., "NormSoftmax: Normalizing the Input of Softmax to Accelerate and Stabilize Training"
(COINS 2023). That the deviation is the population's, the place of eps, and what masks do are this
project's choices. Everything here is differentiable, to any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype

#: A number, or a tensor of one element on x's device.
Tau = float | Tensor


def norm_softmax(x: Tensor, mask: Tensor | None, tau: Tau, eps: float, dim: int) -> Tensor:
    """The function of that name: see `effkern.nn.functional.norm_softmax`.

    Args:
        x: of any shape, any dtype of the kernels.
        mask: broadcastable to x, boolean or of a floating dtype, or None.
        tau: the temperature.
        eps: the least divisor.
        dim: the dimension of the distributions; ignored if x has none.

    Returns:
        y like x, contiguous.
    """
    visible, bias = split_mask(mask)
    z = normalised(x, visible, tau, eps, dim)
    if bias is not None:
        z = z + bias.to(z.dtype)
    if visible is None:
        return torch.softmax(z, dim).to(x.dtype).contiguous()
    # A row without a visible entry keeps zeros in z, so that its gradients are zeros too.
    visible = visible.expand(x.shape)
    hidden = ~visible & visible.any(dim, keepdim=True)
    y = torch.softmax(torch.where(hidden, float("-inf"), torch.where(visible, z, 0)), dim)
    return torch.where(visible, y, 0).to(x.dtype).contiguous()


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


def normalised(x: Tensor, visible: Tensor | None, tau: Tau, eps: float, dim: int) -> Tensor:
    """``(x - mean) / divisor`` in the accumulation dtype; 0 where an entry is hidden.

    That the mean is taken off changes neither the softmax nor its gradient, and large numbers with
    a common offset keep their digits.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    count: Tensor | int = x.shape[dim] if x.dim() else 1
    if visible is None:
        mean = _mean(wide, count, dim)
        # The rounding of that mean, found beside numbers that are small where all are alike.
        centred = wide - (mean + _mean(wide - mean, count, dim))
    else:
        visible = visible.expand(x.shape)
        wide = torch.where(visible, wide, 0)
        count = visible.sum(dim, keepdim=True)
        mean = _mean(wide, count, dim)
        rest = torch.where(visible, wide - mean, 0)
        centred = torch.where(visible, wide - (mean + _mean(rest, count, dim)), 0)
    return centred / divisor(_mean(centred.square(), count, dim), count, tau, eps)


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
    tau = torch.as_tensor(tau, device=variance.device).to(variance.dtype)
    sigma = variance.detach().sqrt()
    few = torch.as_tensor(count, device=variance.device) < 2
    counts_as_tau = few | (sigma >= tau)
    is_small = ~few & (sigma < eps)
    # Where the root is not used its argument is one: the gradient of a root at zero is infinite.
    root = torch.where(counts_as_tau | is_small, 1, variance).sqrt()
    return torch.where(
        is_small, eps, torch.where(counts_as_tau, torch.where(tau > eps, tau, eps), root)
    )


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
    z = normalised(logits, None, tau, eps, min(1, logits.dim() - 1))
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


def _mean(values: Tensor, count: Tensor | int, dim: int) -> Tensor:
    """The mean over ``count`` entries, of which the others are zeros; 0 where there is none."""
    least = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    return values.sum(dim, keepdim=True) / least
