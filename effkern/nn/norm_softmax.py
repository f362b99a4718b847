"""NormSoftmax as layers."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.nn.functional import norm_softmax, norm_softmax_cross_entropy

__all__ = ["NormSoftmax", "NormSoftmaxCrossEntropyLoss"]


class _WithTau(torch.nn.Module):
    """A module with a temperature: a number, a parameter, or a tensor that becomes a buffer."""

    tau: float | Tensor

    def __init__(self, tau: float | Tensor) -> None:
        super().__init__()
        if isinstance(tau, Tensor) and not isinstance(tau, torch.nn.Parameter):
            self.register_buffer("tau", tau)
        else:
            self.tau = tau

    def _tau_repr(self) -> str:
        tau = self.tau
        if isinstance(tau, torch.nn.Parameter):
            return "tau=learnable"
        return f"tau={tau.item() if isinstance(tau, Tensor) else tau}"


class NormSoftmax(_WithTau):
    """Stands in for `torch.nn.Softmax`: the softmax of ``x / max(min(sigma, tau), eps)``, sigma the
    standard deviation of x along ``dim``.

    See `effkern.nn.functional.norm_softmax`.

    Args:
        dim: the dimension of the distributions.
        tau: the temperature, above 0: a number; or a tensor of one element, learned where it is a
            `torch.nn.Parameter`.
        eps: the least divisor.
    """

    def __init__(self, dim: int = -1, tau: float | Tensor = 1.0, eps: float = 1e-6) -> None:
        super().__init__(tau)
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The distributions, like x; mask: boolean or additive, broadcastable to x."""
        return norm_softmax(x, self.dim, tau=self.tau, eps=self.eps, mask=mask)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}, {self._tau_repr()}, eps={self.eps}"


class NormSoftmaxCrossEntropyLoss(_WithTau):
    """Stands in for `torch.nn.CrossEntropyLoss`, of ``logits / max(min(sigma, tau), eps)``, sigma
    their standard deviation over the classes.

    See `effkern.nn.functional.norm_softmax_cross_entropy`.

    Args:
        tau: the temperature, above 0: a number; or a tensor of one element, learned where it is a
            `torch.nn.Parameter`.
        label_smoothing: from 0 to 1.
        ignore_index: targets of this value add nothing.
        reduction: "mean", "sum" or "none".
        weight: of each class, shape ``(C,)``; or None.
        eps: the least divisor.
        inplace: whether the gradient is written over the logits.
    """

    weight: Tensor | None

    def __init__(
        self,
        tau: float | Tensor = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        eps: float = 1e-6,
        inplace: bool = False,
    ) -> None:
        super().__init__(tau)
        self.register_buffer("weight", weight)
        self.inplace = inplace
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.reduction, self.eps = reduction, eps

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss; logits of shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``."""
        return norm_softmax_cross_entropy(
            logits,
            target,
            tau=self.tau,
            eps=self.eps,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self._tau_repr()}, label_smoothing={self.label_smoothing}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, eps={self.eps}"
        )
