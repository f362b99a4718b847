"""RMSNorm: the function and its public ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from effkern.ops._declare import DTYPES, declare_public
from effkern.ops.norm import run
from effkern.ops.norm_checks import check, fits, strided


@overload
def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    residual: None = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
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
    ):
        check("rms_norm", x, residual, normalized_shape, {"weight": weight})
    return run("rms_norm", x, residual, (weight,), dims, eps)


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
