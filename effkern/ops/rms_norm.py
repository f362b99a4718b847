"""RMSNorm: its kernel ops, its gradient, and the public ops ``effkern::rms_norm`` and ``effkern::add_rms_norm``.

A call from `effkern.nn.functional` goes through `RmsNormFunction` to the kernel op. The public ops serve callers of
``torch.ops``, torch.func and torch.export; both call the same `backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference import rms_norm as reference
from effkern.backends.reference._dtypes import accumulation_dtype
from effkern.ops._declare import Family, declare, library

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[: x.dim() - dims]
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    return y, total, x.new_empty(rows, dtype=accumulation_dtype(x.dtype))


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


declare(
    "_rms_norm_forward",
    "(Tensor x, Tensor? residual, Tensor? weight, int dims, float eps) -> (Tensor y, Tensor total, Tensor rstd)",
    fake=_forward_fake,
    reference=reference.rms_norm_forward,
    triton="effkern.backends.triton.rms_norm:rms_norm_forward",
)
declare(
    "_rms_norm_backward",
    "(Tensor grad, Tensor? grad_total, Tensor x, Tensor? weight, Tensor rstd, int dims, bool wants_x,"
    " bool wants_weight) -> (Tensor grad_x, Tensor grad_weight)",
    fake=_backward_fake,
    reference=reference.rms_norm_backward,
    triton="effkern.backends.triton.rms_norm:rms_norm_backward",
)
kernels = Family("_rms_norm_forward", "_rms_norm_backward")


def check(
    name: str, x: Tensor, residual: Tensor | None, normalized_shape: Sequence[int], weight: Tensor | None
) -> None:
    """Refuse arguments that the kernels do not take.

    Raises:
        TypeError: if an argument that must be a tensor is none.
        RuntimeError: for everything else, as PyTorch does; the message names the argument.
    """
    dims = len(normalized_shape)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise RuntimeError(f"{name}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if dims == 0:
        raise RuntimeError(f"{name}: normalized_shape must name at least one dimension, got ()")
    if x.shape[-dims:] != tuple(normalized_shape):
        raise RuntimeError(
            f"{name}: x must end in the dimensions normalized_shape={tuple(normalized_shape)}, "
            f"got shape {tuple(x.shape)}"
        )
    if x.layout != torch.strided:
        raise RuntimeError(f"{name}: x must be a dense tensor, got layout {x.layout}")
    if weight is not None:
        _check_companion(name, "weight", weight, x, tuple(normalized_shape))
        if weight.dtype not in DTYPES:
            raise RuntimeError(f"{name}: weight must be float32, float64, bfloat16 or float16, got {weight.dtype}")
    if residual is not None:
        _check_companion(name, "residual", residual, x, tuple(x.shape))
        if residual.dtype != x.dtype:
            raise RuntimeError(f"{name}: residual must have x's dtype {x.dtype}, got {residual.dtype}")


def _check_companion(name: str, argument: str, value: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor or None, got {type(value).__name__}")
    if value.shape != shape:
        raise RuntimeError(f"{name}: {argument} must have shape {shape}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise RuntimeError(f"{name}: {argument} must be on x's device {x.device}, got {value.device}")
    if value.layout != torch.strided:
        raise RuntimeError(f"{name}: {argument} must be a dense tensor, got layout {value.layout}")


def default_eps(dtype: torch.dtype) -> float:
    """The eps that stands for None: that of the accumulation dtype, as in torch.nn.functional.rms_norm."""
    return torch.finfo(accumulation_dtype(dtype)).eps


class RmsNormFunction(torch.autograd.Function):
    """RMSNorm for autograd: y, or (y, total) where there is a residual."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        forward_kernel, ctx.kernel = kernels(x)
        y, total, rstd = forward_kernel(x, residual, weight, dims, eps)
        ctx.set_materialize_grads(False)
        ctx.dims, ctx.eps = dims, eps
        if residual is None:
            ctx.save_for_backward(x, weight, rstd)
            return y
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
        grad_x, grad_weight = backward(
            ctx.kernel, grad, grad_total, x, weight, rstd, ctx.dims, ctx.eps, needs_x or needs_residual, needs_weight
        )
        return grad_x if needs_x else None, grad_x if needs_residual else None, grad_weight, None, None


def backward(
    kernel: torch._ops.OpOverload,
    grad: Tensor | None,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor | None,
    dims: int,
    eps: float,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, None where not wanted; see `reference.rms_norm_backward`.

    ``grad`` is None when only ``total`` was used. Where the result will itself be differentiated, it is computed by
    the reference formulas, which autograd can follow; ``rstd`` is recomputed from x there, and wherever it is None.
    """
    if grad is None:
        return (grad_total if wants_x else None), None
    if torch.is_grad_enabled() or rstd is None:
        wide = x.to(accumulation_dtype(x.dtype))
        rstd = torch.rsqrt(wide.square().mean(list(range(-dims, 0))) + eps)
    if torch.is_grad_enabled():
        grad_x, grad_weight = reference.rms_norm_backward(
            grad, grad_total, x, weight, rstd, dims, wants_x, wants_weight
        )
    else:
        grad_x, grad_weight = kernel(grad, grad_total, x, weight, rstd, dims, wants_x, wants_weight)
    return (grad_x if wants_x else None), (grad_weight if wants_weight else None)


# ---- the public ops ----

library.define(
    "rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "add_rms_norm(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    check("rms_norm", x, None, normalized_shape, weight)
    eps = default_eps(x.dtype) if eps is None else eps
    y: Tensor = kernels(x)[0](x, None, weight, len(normalized_shape), eps)[0]
    return y


def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    check("add_rms_norm", x, residual, normalized_shape, weight)
    eps = default_eps(x.dtype) if eps is None else eps
    y, total, _ = kernels(x)[0](x, residual, weight, len(normalized_shape), eps)
    return y, total


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, normalized_shape, weight, eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.dims, ctx.eps = len(normalized_shape), default_eps(x.dtype) if eps is None else eps


def _save_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, normalized_shape, weight, eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.dims, ctx.eps = len(normalized_shape), default_eps(x.dtype) if eps is None else eps


def _rms_norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, _, needs_weight, _ = ctx.needs_input_grad
    grad_x, grad_weight = backward(
        kernels(x)[1], grad, None, x, weight, None, ctx.dims, ctx.eps, needs_x, needs_weight
    )
    return grad_x, None, grad_weight, None


def _add_rms_norm_gradients(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    needs_x, needs_residual, _, needs_weight, _ = ctx.needs_input_grad
    grad_x, grad_weight = backward(
        kernels(total)[1],
        grad,
        grad_total,
        total,
        weight,
        None,
        ctx.dims,
        ctx.eps,
        needs_x or needs_residual,
        needs_weight,
    )
    return grad_x if needs_x else None, grad_x if needs_residual else None, None, grad_weight, None


def _batch_first(value: Tensor, dim: int | None, size: int) -> Tensor:
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _rms_norm_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, int]:
    x = _batch_first(x, in_dims[0], info.batch_size)
    if weight is None or in_dims[2] is None:
        return torch.ops.effkern.rms_norm(x, normalized_shape, weight, eps), 0
    y = torch.ops.effkern.rms_norm(x, normalized_shape, None, eps)
    return (y * _aligned(weight, in_dims[2], x, len(normalized_shape))).to(x.dtype), 0


def _add_rms_norm_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    x = _batch_first(x, in_dims[0], info.batch_size)
    residual = _batch_first(residual, in_dims[1], info.batch_size)
    total = x + residual
    weight_dim = None if weight is None else in_dims[3]
    y, _ = _rms_norm_vmap(info, (0, None, weight_dim, None), total, normalized_shape, weight, eps)
    return (y, total), (0, 0)


def _aligned(weight: Tensor, dim: int, x: Tensor, dims: int) -> Tensor:
    """A batch of weights, shaped to multiply a batch of inputs."""
    weight = weight.movedim(dim, 0)
    between = (1,) * (x.dim() - 1 - dims)
    return weight.reshape(weight.shape[0], *between, *weight.shape[1:])


for _name, _implementation, _setup, _gradients, _vmap in (
    ("rms_norm", _rms_norm, _save_rms_norm, _rms_norm_gradients, _rms_norm_vmap),
    ("add_rms_norm", _add_rms_norm, _save_add_rms_norm, _add_rms_norm_gradients, _add_rms_norm_vmap),
):
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_autograd(f"effkern::{_name}", _gradients, setup_context=_setup, lib=library)
    torch.library.register_vmap(f"effkern::{_name}", _vmap, lib=library)


@torch.library.register_fake("effkern::rms_norm", lib=library)
def _(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("effkern::add_rms_norm", lib=library)
def _(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)

