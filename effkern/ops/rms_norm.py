"""RMSNorm: the function and its public ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from effkern.ops._declare import declare_public
from effkern.ops.norm import affine_norm


@overload
def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    residual: None = ...,
    memory_efficient: bool = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    residual: Tensor,
    memory_efficient: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimensions: ``x / sqrt(mean(x^2) + eps) * weight``.

    The formula is equation 4 of Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).

    Args:
        x: shape ``(*, *normalized_shape)``; float32, float64, bfloat16 or float16. Leading
            dimensions may be strided.
        normalized_shape: the dimensions that are normalised together.
        weight: shape ``normalized_shape``, any of the four dtypes, or None.
        eps: added to the mean square; None stands for the machine epsilon of the accumulation
            dtype (float64's for float64, else float32's), as in `torch.nn.functional.rms_norm`.
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
        "rms_norm", x, normalized_shape, weight, None, eps, residual, memory_efficient
    )


def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    return rms_norm(x, normalized_shape, weight, eps, residual=residual)


declare_public(
    "rms_norm(Tensor x, int[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor",
    rms_norm,
)
declare_public(
    "add_rms_norm(Tensor x, Tensor residual, int[] normalized_shape, Tensor? weight=None,"
    " float? eps=None) -> (Tensor, Tensor)",
    _add_rms_norm,
)
