"""CRMSNorm: the function and its public ops."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from effkern.ops._declare import declare_public
from effkern.ops.norm import affine_norm
from effkern.ops.norm_checks import check_x


@overload
def crms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    residual: None = ...,
    memory_efficient: bool = ...,
) -> Tensor: ...
@overload
def crms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    residual: Tensor,
    memory_efficient: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def crms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """CRMSNorm over the last dimension: ``x / sqrt((sum(x^2) + sum(x)^2) / d + eps) * weight``.

    The d - 1 features of x stand for d with sum zero, the last of which is ``-sum(x)``; so this is
    the RMSNorm, and the LayerNorm, of those d, without the last one of the result. The formula is
    section 3.3 of Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm Transformers" (2023).

    Args:
        x: shape ``(*, d - 1)``; float32, float64, bfloat16 or float16. Leading dimensions may be
            strided.
        weight: shape ``(d - 1,)``, any of the four dtypes, or None.
        eps: added to the mean square; None stands for the machine epsilon of the accumulation
            dtype (float64's for float64, else float32's), as in `rms_norm`.
        residual: like x. With it the sum ``x + residual`` is normalised, in the same pass, and
            returned too; the statistics are those of the sum as rounded to x's dtype.
        memory_efficient: keep y for the backward pass in the place of what was normalised, which
            is then restored from y; see docs/norms.md, "Memory".

    Returns:
        y, contiguous, of x's shape and dtype; with a residual the pair ``(y, x + residual)``.
        Under CUDA autocast computed in float32, as `rms_norm`.

    Raises:
        TypeError: if an argument that must be a tensor is none.
        RuntimeError: if a dtype, shape, device or layout does not fit; the message names the
            argument.
    """
    check_x("crms_norm", x)
    if x.dim() == 0:
        raise RuntimeError("crms_norm: x must have at least one dimension, got shape ()")
    return affine_norm("crms_norm", x, x.shape[-1:], weight, None, eps, residual, memory_efficient)


def _add_crms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    return crms_norm(x, weight, eps, residual=residual)


declare_public("crms_norm(Tensor x, Tensor? weight=None, float? eps=None) -> Tensor", crms_norm)
declare_public(
    "add_crms_norm(Tensor x, Tensor residual, Tensor? weight=None, float? eps=None)"
    " -> (Tensor, Tensor)",
    _add_crms_norm,
)
