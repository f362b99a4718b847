"""LayerNorm: the function and its public ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from effkern.ops._declare import declare_public
from effkern.ops.norm import affine_norm


@overload
def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
    memory_efficient: bool = ...,
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
    memory_efficient: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
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
        memory_efficient: keep y for the backward pass in the place of what was normalised, which
            is then restored from y; see docs/norms.md, "Memory".

    Returns:
        y, contiguous, of x's shape and dtype; with a residual the pair ``(y, x + residual)``.
        Under CUDA autocast computed in float32, as PyTorch does.

    Raises:
        TypeError: if an argument that must be a tensor is none.
        RuntimeError: if a dtype, shape, device or layout does not fit; the message names the
            argument.
    """
    return affine_norm(
        "layer_norm", x, normalized_shape, weight, bias, eps, residual, memory_efficient
    )


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
