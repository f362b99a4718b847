"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.nn.functional import rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for `torch.nn.RMSNorm`: same arguments, parameters, state_dict and result, one fused
    kernel.

    Args:
        normalized_shape: the trailing dimensions of the input that are normalised together, or the
            last one's size.
        eps: added to the mean square; None stands for the machine epsilon of the accumulation
            dtype.
        elementwise_affine: whether there is a learnable ``weight`` of shape ``normalized_shape``,
            at first one.
        device, dtype: of the weight.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Normalise x, or x + residual: see `effkern.nn.functional.rms_norm`.

        Returns:
            y like x; with a residual the pair ``(y, x + residual)``.
        """
        if residual is None:
            return rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, residual=residual)
