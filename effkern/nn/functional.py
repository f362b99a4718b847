"""The layers as functions, with the signatures of `torch.nn.functional`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import overload

import torch
from torch import Tensor

from effkern.ops import rms_norm as _ops

__all__ = ["rms_norm"]


@overload
def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = ..., eps: float | None = ..., *, residual: None = ...
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = ..., eps: float | None = ..., *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimensions: ``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich, 2019, eq. 4).

    Args:
        x: shape ``(*, *normalized_shape)``; float32, float64, bfloat16 or float16. Leading dimensions may be strided.
        normalized_shape: the dimensions that are normalised together.
        weight: shape ``normalized_shape``, any of the four dtypes, or None.
        eps: added to the mean square; None stands for the machine epsilon of the accumulation dtype (float64's for
            float64, else float32's), as in `torch.nn.functional.rms_norm`.
        residual: like x. With it the sum ``x + residual`` is normalised, in the same pass, and returned too; the
            statistics are those of the sum as rounded to x's dtype.

    Returns:
        y, contiguous, of x's shape and dtype; with a residual the pair ``(y, x + residual)``. Under CUDA autocast
        computed in float32, as PyTorch does.

    Raises:
        TypeError: if an argument that must be a tensor is none.
        RuntimeError: if a dtype, shape, device or layout does not fit; the message names the argument.
    """
    _ops.check("rms_norm", x, residual, normalized_shape, weight)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and _autocast_to_float32():
        x, weight = x.float(), None if weight is None else weight.float()
        residual = None if residual is None else residual.float()
    if torch._C._are_functorch_transforms_active():
        if residual is None:
            return torch.ops.effkern.rms_norm(x, normalized_shape, weight, eps)
        return torch.ops.effkern.add_rms_norm(x, residual, normalized_shape, weight, eps)
    dims = len(normalized_shape)
    if eps is None:
        eps = _ops.default_eps(x.dtype)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _ops.RmsNormFunction.apply(x, residual, weight, dims, eps)
    y, total, _ = _ops.kernels(x)[0](x, residual, weight, dims, eps)
    return y if residual is None else (y, total)


@cache
def _autocast_to_float32() -> bool:
    """Whether this PyTorch lists rms_norm among the ops that CUDA autocast computes in float32."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")
