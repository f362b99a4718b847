"""What the functions of NormSoftmax refuse: the first argument that does not fit, named, with what
it must be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.ops._declare import DTYPES
from effkern.ops.norm_checks import check_kind


def check(name: str, x: Any, dim: Any, tau: Any, eps: Any, mask: Any) -> int:
    """Raise for the first argument of the function ``name`` that does not fit.

    Returns:
        The dimension, counted from the first.

    Raises:
        TypeError: if an argument that must be a tensor or a number is none.
        IndexError: if x has no such dimension.
        ValueError: if tau or eps, as a number, is out of range.
        RuntimeError: if a dtype, shape, device or layout does not fit.
    """
    check_kind(name, "x", x)
    if not isinstance(dim, int):
        raise TypeError(f"{name}: dim must be an int, got {type(dim).__name__}")
    dims = max(x.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(f"{name}: dim must be a dimension of x, -{dims} to {dims - 1}, got {dim}")
    check_tau(name, tau)
    check_eps(name, eps)
    if mask is not None:
        _check_mask(name, mask, x)
    return dim % dims


def check_tau(name: str, tau: Any) -> None:
    """Raise unless tau is a temperature."""
    if isinstance(tau, Tensor):
        if tau.dtype not in DTYPES or tau.numel() != 1:
            raise RuntimeError(
                f"{name}: tau must be a floating number or a tensor of one element, got shape "
                f"{tuple(tau.shape)} of {tau.dtype}"
            )
    elif not isinstance(tau, int | float | torch.SymFloat):
        raise TypeError(f"{name}: tau must be a number or a tensor, got {type(tau).__name__}")
    elif not tau > 0:
        raise ValueError(f"{name}: tau must be above 0, got {tau}")


def check_eps(name: str, eps: Any) -> None:
    """Raise unless eps is a number from 0 on."""
    if not isinstance(eps, int | float | torch.SymFloat):
        raise TypeError(f"{name}: eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{name}: eps must be at least 0, got {eps}")


def tau_of(tau: float | Tensor, x: Tensor) -> float | Tensor:
    """Tau as the kernels take it: a number, or a tensor of shape () on x's device."""
    if not isinstance(tau, Tensor):
        return float(tau)
    tau = tau.reshape(())
    return tau if tau.device == x.device else tau.to(x.device)


def tau_tensor(tau: float | Tensor, x: Tensor) -> Tensor:
    """What `tau_of` gives, as a tensor of x's accumulation dtype."""
    acc = accumulation_dtype(x.dtype)
    if isinstance(tau, Tensor):
        return tau.to(acc)
    return torch.full((), tau, dtype=acc, device=x.device)


def _check_mask(name: str, mask: Any, x: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: mask must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        raise RuntimeError(
            f"{name}: mask must be bool, float32, float64, bfloat16 or float16, got {mask.dtype}"
        )
    if mask.layout != torch.strided:
        raise RuntimeError(f"{name}: mask must be a dense tensor, got layout {mask.layout}")
    aligned = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.dim() > x.dim() or any(have not in (1, want) for have, want in aligned):
        raise RuntimeError(
            f"{name}: mask must be broadcastable to x's shape {tuple(x.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise RuntimeError(f"{name}: mask must be on x's device {x.device}, got {mask.device}")


_CROSS_ENTROPY = "norm_softmax_cross_entropy"
REDUCTIONS = ("none", "mean", "sum")


def check_cross_entropy(
    logits: Any,
    target: Any,
    weight: Any,
    tau: Any,
    eps: Any,
    label_smoothing: Any,
    ignore_index: Any,
    reduction: Any,
    inplace: bool,
) -> None:
    """Raise for the first argument of `norm_softmax_cross_entropy` that does not fit."""
    name = _CROSS_ENTROPY
    check_kind(name, "logits", logits)
    if logits.dim() == 0:
        raise RuntimeError(f"{name}: logits must have a dimension of classes, got shape ()")
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: target must be a tensor, got {type(target).__name__}")
    of_classes = min(1, logits.dim() - 1)
    classes = logits.shape[of_classes]
    if classes == 0:
        raise RuntimeError(f"{name}: logits must have a class, got shape {tuple(logits.shape)}")
    if target.is_floating_point():
        check_kind(name, "target", target)
        shape, kind = tuple(logits.shape), "of probabilities"
    elif target.dtype in (torch.int64, torch.uint8):
        shape = (*logits.shape[:of_classes], *logits.shape[of_classes + 1 :])
        kind = "of class indices"
    else:
        raise RuntimeError(
            f"{name}: target must be class indices of int64 or uint8 or probabilities of a "
            f"floating dtype, got {target.dtype}"
        )
    if tuple(target.shape) != shape:
        raise RuntimeError(
            f"{name}: a target {kind} must have shape {shape} beside logits of shape "
            f"{tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    if weight is not None:
        check_kind(name, "weight", weight)
        if tuple(weight.shape) != (classes,):
            raise RuntimeError(
                f"{name}: weight must have shape {(classes,)}, got {tuple(weight.shape)}"
            )
    for argument, value in (("target", target), ("weight", weight)):
        if value is not None and value.device != logits.device:
            raise RuntimeError(
                f"{name}: {argument} must be on logits' device {logits.device}, got {value.device}"
            )
    check_tau(name, tau)
    check_eps(name, eps)
    if not isinstance(ignore_index, int):
        raise TypeError(f"{name}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if ignore_index >= 0 and target.is_floating_point():
        raise RuntimeError(
            f"{name}: ignore_index is not supported for a target of probabilities, got "
            f"{ignore_index}"
        )
    if not isinstance(label_smoothing, int | float | torch.SymFloat):
        raise TypeError(
            f"{name}: label_smoothing must be a number, got {type(label_smoothing).__name__}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if inplace:
        _check_inplace(logits, reduction)


def _check_inplace(logits: Tensor, reduction: str) -> None:
    why = ""
    if reduction == "none":
        why = 'reduction must be "mean" or "sum"'
    elif logits.dim() > 2 or (logits.stride(-1) != 1 and logits.shape[-1] > 1):
        why = "logits must be of shape (N, C) or (C,), with contiguous rows"
    elif logits.is_leaf and logits.requires_grad:
        why = "logits must be no leaf that requires a gradient"
    if why:
        raise ValueError(f"{_CROSS_ENTROPY}: with inplace=True {why}")
