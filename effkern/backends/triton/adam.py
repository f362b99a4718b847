"""Adam, AdamW and AMSGrad in Triton: one launch for all parameters.

The formula is that of csrc/math/adam.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from effkern.backends.table import DTYPES
from effkern.backends.triton import multi_tensor
from effkern.backends.triton.checks import check_lists
from effkern.backends.triton.launch import COMPILER_OPTIONS, device_guard
from effkern.backends.triton.multi_tensor import chunk_tensor, update_chunk
from effkern.backends.triton.numerics import (
    TRITON_DTYPE,
    accumulation_dtype,
    larger,
    scalar,
)


@triton.jit
def adam_update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars, STATES: tl.constexpr):
    """One step of one block. A third state makes it AMSGrad."""
    one_minus_beta1, beta2, one_minus_beta2, eps, shrink, l2, sign, step_size, rsqrt_bias2 = scalars
    grad = grad * sign
    grad = tl.where(
        l2 != 0, grad + param * l2, grad
    )  # an infinite parameter times no decay is not NaN
    param = param * shrink
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    second = exp_avg_sq
    if STATES == 3:
        max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq)
        second = max_exp_avg_sq
    param = param - exp_avg * step_size / (tl.sqrt(second) * rsqrt_bias2 + eps)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


# Triton rounds a Python float to float32 unless the argument is annotated, and float64 parameters
# need all of it.
@triton.jit
def adam_kernel(
    table,
    chunks,
    bias_corrections,
    step_size: tl.float64,
    rsqrt_bias2: tl.float64,
    one_minus_beta1: tl.float64,
    beta2: tl.float64,
    one_minus_beta2: tl.float64,
    eps: tl.float64,
    shrink: tl.float64,
    l2: tl.float64,
    sign: tl.float64,
    STATES: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor.

    Reads 16 bytes and writes 12 per float32 element, 20 and 16 with AMSGrad.

    At most 64 registers a thread for float32, so that half of all threads are resident: with one
    16-byte access per tensor and thread in flight that is more than the latency of memory asks for.

    bias_corrections: None, or float64 (tensors, 2): step_size and rsqrt_bias2 where the tensors'
    steps differ.
    """
    if bias_corrections is not None:
        pair = bias_corrections + 2 * chunk_tensor(chunks)
        step_size = tl.load(pair)
        rsqrt_bias2 = tl.load(pair + 1)
    scalars = (
        scalar(one_minus_beta1, ACC),
        scalar(beta2, ACC),
        scalar(one_minus_beta2, ACC),
        scalar(eps, ACC),
        scalar(shrink, ACC),
        scalar(l2, ACC),
        scalar(sign, ACC),
        scalar(step_size, ACC),
        scalar(rsqrt_bias2, ACC),
    )
    update_chunk(table, chunks, adam_update, scalars, STATES, DTYPE, ACC, BLOCK)


def adam_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """``effkern::_adam_``: one step for tensors of one dtype on one device.

    The table of addresses goes to the device at every call; `adam_planned_` keeps it there.
    """
    if not params:
        return
    device = params[0].device
    with device_guard(params[0], "_adam_"):
        lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
        if amsgrad:
            lists["max_exp_avg_sqs"] = max_exp_avg_sqs
        check_lists(params, lists, steps)
        for step in steps:
            step.add_(1)
        _launch(
            _to_device(multi_tensor.build_table(params, list(lists.values())), device),
            _to_device(multi_tensor.build_chunks([param.numel() for param in params]), device),
            params[0].dtype,
            [float(step) for step in steps],
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            decoupled,
            amsgrad,
            maximize,
        )


def adam_planned_(
    table: torch.Tensor,
    device_table: torch.Tensor,
    chunks: torch.Tensor,
    layouts: torch.Tensor,
    moved: bool,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """``effkern::_adam_planned_``: the same with all addresses in place."""
    with device_guard(device_table, "_adam_planned_"):
        if moved and device_table.data_ptr() != table.data_ptr():
            multi_tensor.upload(table, device_table)
        dtype, float64_steps = layouts[:2].tolist()
        _launch(
            device_table,
            chunks,
            DTYPES[dtype],
            multi_tensor.count_steps(table, float64=bool(float64_steps)),
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            decoupled,
            amsgrad,
            maximize,
        )


def _launch(
    table: torch.Tensor,
    chunks: torch.Tensor,
    dtype: torch.dtype,
    steps: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """The one launch. ``table`` and ``chunks`` lie on the device; ``steps``: each tensor's t."""
    if not chunks.numel():
        return
    pairs = {t: _bias_corrections(t, lr, beta1, beta2) for t in set(steps)}
    bias_corrections, (step_size, rsqrt_bias2) = None, pairs[steps[0]]
    if len(pairs) > 1:
        # Parameters that joined late: their own two numbers each go to the device with every step.
        each = torch.tensor([pairs[t] for t in steps], dtype=torch.float64)
        bias_corrections = _to_device(each, chunks.device)
    adam_kernel[(chunks.shape[0],)](
        table,
        chunks,
        bias_corrections,
        step_size,
        rsqrt_bias2,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        1.0 - lr * weight_decay if decoupled else 1.0,
        0.0 if decoupled else weight_decay,
        -1.0 if maximize else 1.0,
        STATES=3 if amsgrad else 2,
        DTYPE=TRITON_DTYPE[dtype],
        ACC=TRITON_DTYPE[accumulation_dtype(dtype)],
        BLOCK=multi_tensor.block_size(dtype),
        num_warps=multi_tensor.WARPS,
        **COMPILER_OPTIONS,
    )


def _bias_corrections(t: float, lr: float, beta1: float, beta2: float) -> tuple[float, float]:
    """step_size = lr / (1 - beta1^t) and rsqrt_bias2 = 1 / sqrt(1 - beta2^t), for t from 1."""
    return lr / _one_minus_power(beta1, t), 1.0 / math.sqrt(_one_minus_power(beta2, t))


def _one_minus_power(beta: float, t: float) -> float:
    return -math.expm1(t * math.log(beta)) if beta else 1.0


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    target = torch.empty_like(tensor, device=device)
    multi_tensor.upload(tensor, target)
    return target
