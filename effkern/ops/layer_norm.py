"""LayerNorm: the function and its public ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.ops._declare import DTYPES, declare_public
from effkern.ops.norm import run
from effkern.ops.norm_checks import check, fits, strided


@overload
def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimensions: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Var is the population variance. The formula is Ba, Kiros and Hinton, "Layer Normalization"
    (2016), as `torch.nn.functional.layer_norm` has it.

    Args:
        x: shape ``(*, *normalized_shape)``; float32, float64, bfloat16 or float16. Leading
            dimensions may be strided.
        normalized_shape: the dimensions that are normalised together.
        weight: shape ``normalized_shape``, any of the four dtypes, or None.
        bias: the same.
        eps: added to the variance.
        residual: like x. With it the sum ``x + residual`` is normalised, in the same pass, and
            returned too; the statistics are those of the sum as rounded to x's dtype.

    Returns:
        y, contiguous, of x's shape and dtype; with a residual the pair ``(y, x + residual)``.
        Under CUDA autocast computed in float32, as PyTorch does.

    Raises:
        TypeError: if an argument that must be a tensor is none.
        RuntimeError: if a dtype, shape, device or layout does not fit; the message names the
            argument.
    """
    dims = len(normalized_shape)
    # The common case in one expression, each part in its cheapest form: every call pays for it.
    if not (
        isinstance(x, Tensor)
        and x.dtype in DTYPES
        and x.layout is strided
        and (shape := x.shape)
        and dims > 0
        and (shape[-1] == normalized_shape[0] if dims == 1 else shape[-dims:] == normalized_shape)
        and residual is None
        and fits(weight, normalized_shape, x)
        and fits(bias, normalized_shape, x)
    ):
        check("layer_norm", x, residual, normalized_shape, {"weight": weight, "bias": bias})
    if bias is not None and (weight is None or weight.dtype != bias.dtype):
        weight, bias = _alike(weight, bias, x)
    return run("layer_norm", x, residual, (weight, bias), dims, eps)


def _alike(weight: Tensor | None, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both, in one dtype, as the kernels take them."""
    if weight is None:
        return torch.ones_like(bias), bias
    acc = accumulation_dtype(x.dtype)
    return weight.to(acc), bias.to(acc)


def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    return layer_norm(x, normalized_shape, weight, bias, eps, residual=residual)


declare_public(
    "layer_norm(Tensor x, int[] normalized_shape, Tensor? weight=None, Tensor? bias=None,"
    " float eps=1e-05) -> Tensor",
    layer_norm,
)
declare_public(
    "add_layer_norm(Tensor x, Tensor residual, int[] normalized_shape, Tensor? weight=None,"
    " Tensor? bias=None, float eps=1e-05) -> (Tensor, Tensor)",
    _add_layer_norm,
)
