"""RMSNorm: the function, its gradient, its kernel ops and its public ops.

A call goes from `rms_norm` through `RmsNormFunction` to the kernel op; the public ops
``torch.ops.effkern.rms_norm`` and ``add_rms_norm`` decompose into that call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor

from effkern.backends.reference import rms_norm as reference
from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.ops._declare import (
    DTYPES,
    Family,
    Implementation,
    declare,
    declare_public,
    imported_at_first_call,
)

# ---- the kernel ops ----


def _add_forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[: x.dim() - dims], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


def _without_residual(add_forward: Implementation) -> Implementation:
    """The forward kernel without a residual, from the one with."""

    def forward(x: Tensor, weight: Tensor | None, dims: int, eps: float) -> tuple[Tensor, Tensor]:
        y, _, rstd = add_forward(x, None, weight, dims, eps)
        return y, rstd

    return forward


def _backward_fake(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dims: int,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if wants_x else 0)
    if weight is None or not wants_weight:
        return grad_x, x.new_empty(0)
    return grad_x, weight.new_empty(weight.shape)


_triton_forward = imported_at_first_call("effkern.backends.triton.rms_norm:rms_norm_forward")
declare(
    "_rms_norm_forward",
    "(Tensor x, Tensor? weight, int dims, float eps) -> (Tensor y, Tensor rstd)",
    fake=_without_residual(_add_forward_fake),
    reference=_without_residual(reference.rms_norm_forward),
    triton=_without_residual(_triton_forward),
)
declare(
    "_add_rms_norm_forward",
    "(Tensor x, Tensor residual, Tensor? weight, int dims, float eps)"
    " -> (Tensor y, Tensor total, Tensor rstd)",
    fake=_add_forward_fake,
    reference=reference.rms_norm_forward,
    triton=_triton_forward,
)
declare(
    "_rms_norm_backward",
    "(Tensor grad, Tensor? grad_total, Tensor x, Tensor? weight, Tensor rstd, int dims,"
    " bool wants_x, bool wants_weight) -> (Tensor grad_x, Tensor grad_weight)",
    fake=_backward_fake,
    reference=reference.rms_norm_backward,
    triton=imported_at_first_call("effkern.backends.triton.rms_norm:rms_norm_backward"),
)
kernels = Family("_rms_norm_forward", "_add_rms_norm_forward", "_rms_norm_backward")

# ---- the function ----


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
        and x.layout is _strided
        and (shape := x.shape)
        and dims > 0
        and (shape[-1] == normalized_shape[0] if dims == 1 else shape[-dims:] == normalized_shape)
        and residual is None
        and (
            weight is None
            or (
                isinstance(weight, Tensor)
                and weight.shape == normalized_shape
                and weight.dtype in DTYPES
                and weight.layout is _strided
                and ((weight.is_cpu and x.is_cpu) or weight.device == x.device)
            )
        )
    ):
        _check(x, residual, normalized_shape, weight)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and _autocast_to_float32():
        x, weight = x.float(), None if weight is None else weight.float()
        residual = None if residual is None else residual.float()
    if eps is None:
        eps = torch.finfo(accumulation_dtype(x.dtype)).eps
    if _functorch_is_active():
        # torch.func differentiates and maps the plain formula, to any order and in forward mode.
        y, total, _ = reference.rms_norm_forward(x, residual, weight, dims, eps)
        return y if residual is None else (y, total)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if residual is None:
            return RmsNormFunction.apply(x, weight, dims, eps)
        return AddRmsNormFunction.apply(x, residual, weight, dims, eps)
    forward, add_forward, _ = kernels(x)
    if residual is None:
        return forward(x, weight, dims, eps)[0]
    return add_forward(x, residual, weight, dims, eps)[:2]


_strided = torch.strided
_functorch_is_active = torch._C._are_functorch_transforms_active


def _check(
    x: Tensor, residual: Tensor | None, normalized_shape: Sequence[int], weight: Tensor | None
) -> None:
    """Raise for the first argument that does not fit; do nothing where all do."""
    dims = len(normalized_shape)
    if not isinstance(x, Tensor):
        raise TypeError(f"rms_norm: x must be a tensor, got {type(x).__name__}")
    _check_kind("x", x)
    if dims == 0:
        raise RuntimeError("rms_norm: normalized_shape must name at least one dimension, got ()")
    if x.shape[-dims:] != tuple(normalized_shape):
        raise RuntimeError(
            f"rms_norm: x must end in normalized_shape={tuple(normalized_shape)}, "
            f"got shape {tuple(x.shape)}"
        )
    for name, value, shape in (
        ("weight", weight, tuple(normalized_shape)),
        ("residual", residual, tuple(x.shape)),
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"rms_norm: {name} must be a tensor or None, got {type(value).__name__}"
            )
        _check_kind(name, value)
        if value.shape != shape:
            raise RuntimeError(
                f"rms_norm: {name} must have shape {shape}, got {tuple(value.shape)}"
            )
        if value.device != x.device:
            raise RuntimeError(
                f"rms_norm: {name} must be on x's device {x.device}, got {value.device}"
            )
    if residual is not None and residual.dtype != x.dtype:
        raise RuntimeError(
            f"rms_norm: residual must have x's dtype {x.dtype}, got {residual.dtype}"
        )


def _check_kind(name: str, value: Tensor) -> None:
    if value.dtype not in DTYPES:
        raise RuntimeError(
            f"rms_norm: {name} must be float32, float64, bfloat16 or float16, got {value.dtype}"
        )
    if value.layout != torch.strided:
        raise RuntimeError(f"rms_norm: {name} must be a dense tensor, got layout {value.layout}")


@cache
def _autocast_to_float32() -> bool:
    """Whether this PyTorch lists rms_norm among the ops that CUDA autocast computes in float32."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")


# ---- the gradient ----


class RmsNormFunction(torch.autograd.Function):
    """RMSNorm for autograd, without a residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int, eps: float) -> Tensor:
        """See `reference.rms_norm_forward`."""
        forward, _, backward = kernels(x)
        y, rstd = forward(x, weight, dims, eps)
        ctx.call = backward, dims, eps
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `reference.rms_norm_backward`."""
        wants_x, wants_weight, _, _ = ctx.needs_input_grad
        grad_x, grad_weight = _gradients(ctx, grad, None, wants_x, wants_weight)
        return grad_x, grad_weight, None, None


class AddRmsNormFunction(torch.autograd.Function):
    """RMSNorm for autograd, with a residual: y and the sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, dims: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `reference.rms_norm_forward`."""
        _, add_forward, backward = kernels(x)
        y, total, rstd = add_forward(x, residual, weight, dims, eps)
        ctx.call = backward, dims, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """See `reference.rms_norm_backward`; a gradient is None where its output was not used."""
        needs_x, needs_residual, wants_weight, _, _ = ctx.needs_input_grad
        if grad is None:
            grad_x, grad_weight = grad_total, None
        else:
            grad_x, grad_weight = _gradients(
                ctx, grad, grad_total, needs_x or needs_residual, wants_weight
            )
        return (
            grad_x if needs_x else None,
            grad_x if needs_residual else None,
            grad_weight,
            None,
            None,
        )


def _gradients(
    ctx: Any, grad: Tensor, grad_total: Tensor | None, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of what was normalised and of the weight; None where not wanted.

    A gradient that will itself be differentiated is computed by the reference formula, which
    autograd follows, with rstd as a function of x.
    """
    x, weight, rstd = ctx.saved_tensors
    kernel, dims, eps = ctx.call
    if torch.is_grad_enabled():
        kernel, rstd = reference.rms_norm_backward, reference.rstd(x, dims, eps)
    grad_x, grad_weight = kernel(grad, grad_total, x, weight, rstd, dims, wants_x, wants_weight)
    return grad_x if wants_x else None, grad_weight if wants_weight else None


# ---- the public ops ----


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
