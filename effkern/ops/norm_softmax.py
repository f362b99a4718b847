"""NormSoftmax: the function."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.backends.reference import norm_softmax as reference
from effkern.ops.norm_softmax_checks import check, tau_of


def norm_softmax(
    x: Tensor,
    dim: int = -1,
    *,
    tau: float | Tensor = 1.0,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """The softmax of ``x / max(min(sigma, tau), eps)``, sigma the standard deviation along ``dim``.

    NormSoftmax of Jiang et al. (COINS 2023). Sigma is the population's, over the visible entries;
    where there are fewer than two it counts as tau. A row that is constant gives a uniform
    distribution, a row without a visible entry zeros.

    Args:
        x: of any shape; float32, float64, bfloat16 or float16. Entries that shall not take part are
            hidden by ``mask``, not by -inf.
        dim: the dimension of the distributions.
        tau: the temperature, above 0: a number, or a tensor of one element, to which a gradient
            flows: ``-sum(g x) / tau^2`` of rows with sigma >= tau > eps, g the gradient of the
            normalised logits.
        eps: the least divisor, at least 0.
        mask: broadcastable to x's shape. Boolean: True takes part. Of a floating dtype: entries at
            or below half its lowest finite number are hidden, others are added to the normalised
            logits, and sigma is that of x without them. A gradient flows to them.

    Returns:
        y, contiguous, of x's shape and dtype; zeros at hidden entries. Under CUDA autocast computed
        in float32, as PyTorch's softmax.

    Raises:
        TypeError: if an argument that must be a tensor or a number is none.
        IndexError: if x has no such dimension.
        ValueError: if tau or eps, as a number, is out of range.
        RuntimeError: if a dtype, shape, device or layout does not fit; the message names the
            argument.
    """
    dim = check("norm_softmax", x, dim, tau, eps, mask)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        x = x.float()
    return reference.norm_softmax(x, mask, tau_of(tau, x), eps, dim)
