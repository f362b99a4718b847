"""The cross-entropy of NormSoftmax in Triton: the formula of csrc/math/cross_entropy.h.

A program takes a row, a block at a time, and reads it three times: for the deviation, which all
exponentials need, for the sums over those, and for the gradient, which is written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.backends.triton.checks import check_device, check_dtype
from effkern.backends.triton.launch import COMPILER_OPTIONS, device_guard
from effkern.backends.triton.norm_softmax_kernels import (
    NO_MASK,
    divisor_of,
    find_long,
    load_x,
    raised,
    temperature,
)
from effkern.backends.triton.numerics import (
    TRITON_DTYPE,
    accumulation_dtype,
    scalar,
    to_accumulator,
    to_storage,
)
from effkern.backends.triton.rows import as_rows, row_offset

#: The most columns that a program holds at a time, in bytes of the accumulation type.
BLOCK_BYTES = 16 * 1024

INDICES, PROBABILITIES = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def coefficients(
    probabilities,
    weight,
    target,
    column,
    inside,
    classes,
    smoothing,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
):
    """What the loss multiplies the logarithms of these classes by, less its sign."""
    share = scalar(1.0, ACC) - scalar(smoothing, ACC)
    uniform = scalar(smoothing, ACC) / classes
    if KIND == INDICES:
        a = tl.where(column == target, share + uniform, uniform)
    else:
        q = to_accumulator(tl.load(probabilities + column, mask=inside, other=0), ACC)
        a = q * share + uniform
    if weight is not None:
        a = a * tl.load(weight + column, mask=inside, other=0)
    return tl.where(inside, a, 0)


@triton.jit
def cross_entropy_kernel(
    logits,
    target,
    weight,
    tau,
    scale,
    loss,
    grad,
    grad_tau,
    logits_rows,
    target_rows,
    grad_rows,
    classes,
    scale_stride,
    ignore_index,
    tau_value: tl.float64,
    eps: tl.float64,
    smoothing: tl.float64,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's loss and, where wanted, its gradients; ``scale`` is None where none is."""
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + row_offset(row, logits_rows)
    probabilities = target
    index = row
    counts = row >= 0
    if KIND == INDICES:
        index = tl.load(target + row)
        counts = index != ignore_index
    else:
        probabilities = target + row_offset(row, target_rows)

    mean, squares, count = find_long(x_row, None, 1, 1, classes, 0.0, NO_MASK, ACC, BLOCK)
    number = temperature(tau, tau_value, ACC)
    divisor, is_sigma, is_tau = divisor_of(squares, count, number, scalar(eps, ACC))
    inverse = 1 / divisor

    # Of each lane: the sum of weights e, and the weighted mean of c.
    tops = tl.full((BLOCK,), float("-inf"), ACC)
    weights = tl.zeros((BLOCK,), ACC)
    means_c = tl.zeros((BLOCK,), ACC)
    sums_a = tl.zeros((BLOCK,), ACC)
    sums_ac = tl.zeros((BLOCK,), ACC)
    for start in range(0, classes, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = column < classes
        c = load_x(x_row, column, inside, ACC) - mean
        z = c * inverse
        tops, factor = raised(tops, z, inside)
        e = tl.where(inside, tl.exp(z - tops), 0)
        weights *= factor
        both = weights + e
        part = tl.where(both == 0, 0, e / both)
        means_c += tl.where(inside, c - means_c, 0) * part
        weights = both
        a = coefficients(
            probabilities, weight, index, column, inside, classes, smoothing, KIND, ACC
        )
        sums_a += a
        sums_ac += tl.where(inside, a * c, 0)
    top = tl.max(tops, axis=0)
    weights *= tl.where(tops == top, 1, tl.exp(tops - top))
    total = tl.sum(weights, axis=0)
    mean_c = tl.sum(weights * means_c, axis=0) / total
    a_total, ac = tl.sum(sums_a, axis=0), tl.sum(sums_ac, axis=0)
    value = a_total * tl.log(total) - (ac * inverse - a_total * top)
    if KIND == INDICES:
        # An index out of range has no class: its loss is no number.
        valid = tl.where(index >= 0, tl.where(index < classes, 1, 0), 0)
        value = tl.where(valid != 0, value, float("nan"))
    tl.store(loss + row, tl.where(counts, value, 0))

    if scale is not None:
        factor = tl.load(scale + row * scale_stride)
        factor = tl.where(counts, factor, 0)
        along = a_total * mean_c - ac
        if grad_tau is not None:
            tl.store(grad_tau + row, tl.where(is_tau, -along / (number * number), 0) * factor)
        if grad is not None:
            on_c = tl.where(is_sigma, along / squares, 0)
            p_factor = a_total / total
            out_row = grad + row_offset(row, grad_rows)
            for start in range(0, classes, BLOCK):
                column = (start + tl.arange(0, BLOCK)).to(tl.int64)
                inside = column < classes
                c = load_x(x_row, column, inside, ACC) - mean
                a = coefficients(
                    probabilities, weight, index, column, inside, classes, smoothing, KIND, ACC
                )
                dz = tl.exp(c * inverse - top) * p_factor - a
                dx = tl.where(counts, (dz - c * on_c) * (inverse * factor), 0)
                tl.store(out_row + column, to_storage(dx, grad.dtype.element_ty), mask=inside)


def rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    eps: float,
    label_smoothing: float,
    ignore_index: int,
    scale: Tensor | None,
    wants_logits: bool,
    wants_tau: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``effkern::_norm_softmax_cross_entropy``."""
    grad = torch.empty(
        logits.shape if wants_logits else 0, dtype=logits.dtype, device=logits.device
    )
    numbers = tau_value, eps, label_smoothing
    into = grad if wants_logits else None
    loss, grad_tau = _run(
        logits, target, weight, tau, numbers, ignore_index, scale, into, wants_tau
    )
    return loss, grad, grad_tau


def rows_in_place(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    eps: float,
    label_smoothing: float,
    ignore_index: int,
    scale: Tensor,
    wants_tau: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``effkern::_norm_softmax_cross_entropy_``."""
    numbers = tau_value, eps, label_smoothing
    return _run(logits, target, weight, tau, numbers, ignore_index, scale, logits, wants_tau)


def _run(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tau: Tensor | None,
    numbers: tuple[float, float, float],
    ignore_index: int,
    scale: Tensor | None,
    grad: Tensor | None,
    wants_tau: bool,
) -> tuple[Tensor, Tensor]:
    check_dtype(logits, "logits")
    check_device(target, "target", logits, "logits")
    if logits.dim() != 2:
        raise RuntimeError(f"logits have {logits.dim()} dimensions; they must have 2")
    n, classes = logits.shape
    acc = accumulation_dtype(logits.dtype)
    given: list[tuple[str, Tensor | None, int]] = [("weight", weight, classes), ("tau", tau, 1)]
    if scale is not None:
        given.append(("scale", scale, 1 if scale.numel() == 1 else n))
    for name, tensor, count in given:
        if tensor is None:
            continue
        check_device(tensor, name, logits, "logits")
        if tensor.dtype != acc or tensor.numel() != count or not tensor.is_contiguous():
            raise RuntimeError(f"{name} must be {count} contiguous numbers of {acc}")
    if scale is None and (grad is not None or wants_tau):
        raise RuntimeError("a gradient is wanted; it needs a scale")
    kind = PROBABILITIES if target.is_floating_point() else INDICES
    if kind == INDICES and (target.dtype != torch.int64 or target.shape != (n,)):
        raise RuntimeError(f"target of class indices must be {n} numbers of int64")
    if kind == PROBABILITIES and (target.shape != logits.shape):
        raise RuntimeError(f"target must have the shape of logits, {tuple(logits.shape)}")
    loss = torch.empty(n, dtype=acc, device=logits.device)
    grad_tau = torch.empty(n if wants_tau else 0, dtype=acc, device=logits.device)
    with device_guard(logits, "_norm_softmax_cross_entropy"):
        if not n:
            return loss, grad_tau
        source, source_rows = as_rows(logits, 1)
        grad_rows = (
            source_rows if grad is logits else as_rows(source if grad is None else grad, 1)[1]
        )
        if grad is logits and source is not logits:
            raise RuntimeError("logits that are overwritten must have contiguous rows")
        target_rows: Any = None
        if kind == PROBABILITIES:
            target, target_rows = as_rows(target, 1)
        block = min(triton.next_power_of_2(max(classes, 1)), BLOCK_BYTES // acc.itemsize)
        cross_entropy_kernel[(n,)](
            source,
            target.contiguous() if kind == INDICES else target,
            weight,
            tau,
            scale,
            loss,
            grad,
            grad_tau if wants_tau else None,
            source_rows,
            target_rows,
            grad_rows,
            classes,
            0 if scale is None or scale.numel() == 1 else 1,
            ignore_index,
            *numbers,
            KIND=kind,
            ACC=TRITON_DTYPE[acc],
            BLOCK=block,
            num_warps=max(block * acc.itemsize // (32 * 32), 1),
            **COMPILER_OPTIONS,
        )
    return loss, grad_tau
