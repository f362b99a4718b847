"""The cross-entropy of NormSoftmax: the function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference import norm_softmax as reference
from effkern.ops.norm_checks import check_kind
from effkern.ops.norm_softmax_checks import check_eps, check_tau, tau_of

_NAME = "norm_softmax_cross_entropy"
REDUCTIONS = ("none", "mean", "sum")


def norm_softmax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    tau: float | Tensor = 1.0,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.cross_entropy` of ``logits / max(min(sigma, tau), eps)``, sigma the
    standard deviation over the classes: see `norm_softmax`.

    Args:
        logits: shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; float32, float64, bfloat16 or
            float16.
        target: class indices (int64), of logits' shape without C; or probabilities, of logits'
            shape and a floating dtype.
        tau: the temperature, above 0: a number, or a tensor of one element, to which a gradient
            flows.
        eps: the least divisor, at least 0.
        weight: of each class, shape ``(C,)``; or None.
        label_smoothing: from 0 to 1, as there.
        ignore_index: targets of this value add nothing; for class indices.
        reduction: "mean", "sum" or "none", as there.

    Returns:
        The loss, of logits' dtype: shape () but for "none", which gives that of a target of
        indices.

    Raises:
        TypeError: if an argument that must be a tensor or a number is none.
        ValueError: if a number or the reduction is none of those that it may be.
        RuntimeError: if a dtype, shape, device or layout does not fit; the message names the
            argument.
    """
    check(logits, target, weight, tau, eps, label_smoothing, reduction)
    return reference.norm_softmax_cross_entropy(
        logits, target, weight, tau_of(tau, logits), eps, label_smoothing, ignore_index, reduction
    )


def check(
    logits: Any,
    target: Any,
    weight: Any,
    tau: Any,
    eps: Any,
    label_smoothing: Any,
    reduction: Any,
) -> None:
    """Raise for the first argument that does not fit."""
    check_kind(_NAME, "logits", logits)
    if logits.dim() == 0:
        raise RuntimeError(f"{_NAME}: logits must have a dimension of classes, got shape ()")
    if not isinstance(target, Tensor):
        raise TypeError(f"{_NAME}: target must be a tensor, got {type(target).__name__}")
    of_classes = min(1, logits.dim() - 1)
    if target.is_floating_point():
        check_kind(_NAME, "target", target)
        shape, kind = tuple(logits.shape), "of probabilities"
    elif target.dtype == torch.int64:
        shape = (*logits.shape[:of_classes], *logits.shape[of_classes + 1 :])
        kind = "of class indices"
    else:
        raise RuntimeError(
            f"{_NAME}: target must be class indices of int64 or probabilities of a floating dtype, "
            f"got {target.dtype}"
        )
    if tuple(target.shape) != shape:
        raise RuntimeError(
            f"{_NAME}: a target {kind} must have shape {shape} beside logits of shape "
            f"{tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    others = {"target": target}
    if weight is not None:
        check_kind(_NAME, "weight", weight)
        if tuple(weight.shape) != (logits.shape[of_classes],):
            raise RuntimeError(
                f"{_NAME}: weight must have shape {(logits.shape[of_classes],)}, got "
                f"{tuple(weight.shape)}"
            )
        others["weight"] = weight
    for argument, value in others.items():
        if value.device != logits.device:
            raise RuntimeError(
                f"{_NAME}: {argument} must be on logits' device {logits.device}, got {value.device}"
            )
    check_tau(_NAME, tau)
    check_eps(_NAME, eps)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{_NAME}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{_NAME}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
