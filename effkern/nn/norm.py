"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.nn.functional import crms_norm
from effkern.nn.parameters import weight_and_bias, weight_of
from effkern.ops.norm import affine_norm

__all__ = ["CRMSNorm", "LayerNorm", "RMSNorm"]

Device = torch.device | str | int | None

# torch.fx goes into layers that are not PyTorch's own, and is not to go further.
torch.fx.wrap("affine_norm")


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
        memory_efficient: keep the output for the backward pass in the place of the input; see
            docs/norms.md, "Memory".
    """

    memory_efficient = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)  # type: ignore[arg-type]
        self.memory_efficient = memory_efficient

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Normalise x, or x + residual: see `effkern.nn.functional.rms_norm`.

        Returns:
            y like x; with a residual the pair ``(y, x + residual)``.
        """
        return affine_norm(
            "rms_norm",
            x,
            self.normalized_shape,
            weight_of(self),
            None,
            self.eps,
            residual,
            self.memory_efficient,
        )


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for `torch.nn.LayerNorm`: same arguments, parameters, state_dict and result, one
    fused kernel.

    Args:
        normalized_shape: the trailing dimensions of the input that are normalised together, or the
            last one's size.
        eps: added to the variance.
        elementwise_affine: whether there is a learnable ``weight`` of shape ``normalized_shape``,
            at first one.
        bias: whether there is a learnable ``bias`` of the same shape too, at first zero.
        device, dtype: of both.
        memory_efficient: keep the output for the backward pass in the place of the input; see
            docs/norms.md, "Memory".
    """

    memory_efficient = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]
        self.memory_efficient = memory_efficient

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, the input, or x + residual: see `effkern.nn.functional.layer_norm`.

        Returns:
            y like x; with a residual the pair ``(y, x + residual)``.
        """
        weight, bias = weight_and_bias(self)
        return affine_norm(
            "layer_norm",
            input,
            self.normalized_shape,
            weight,
            bias,
            self.eps,
            residual,
            self.memory_efficient,
        )


class CRMSNorm(torch.nn.Module):
    """The RMSNorm of d features whose sum is zero, of which the last is not stored: inputs and
    outputs have d - 1.

    Args:
        d: the number of features that the input stands for.
        eps: added to the mean square; None stands for the machine epsilon of the accumulation
            dtype.
        elementwise_affine: whether there is a learnable ``weight`` of shape ``(d - 1,)``, at first
            one.
        device, dtype: of the weight.
        memory_efficient: keep the output for the backward pass in the place of the input; see
            docs/norms.md, "Memory".

    Raises:
        ValueError: if d is less than 2.
    """

    memory_efficient = False

    def __init__(
        self,
        d: int,
        eps: float | None = None,
        elementwise_affine: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.memory_efficient = memory_efficient
        self.weight: torch.nn.Parameter | None
        if d < 2:
            raise ValueError(f"CRMSNorm: d must be at least 2, got {d}")
        self.d, self.eps, self.elementwise_affine = d, eps, elementwise_affine
        weight = torch.empty(d - 1, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if weight is None else torch.nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, or x + residual: see `effkern.nn.functional.crms_norm`.

        Returns:
            y like x; with a residual the pair ``(y, x + residual)``.

        Raises:
            RuntimeError: if x has not d - 1 features.
        """
        if x.dim() and x.shape[-1] != self.d - 1:
            raise RuntimeError(
                f"CRMSNorm: x must have d - 1 = {self.d - 1} features, got shape {tuple(x.shape)}"
            )
        return crms_norm(
            x,
            weight_of(self),
            self.eps,
            residual=residual,
            memory_efficient=self.memory_efficient,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.d}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
