"""One step of an update rule in Triton: one launch for all parameters, two for LAMB.

The rules are in `effkern.backends.triton.rules`, LAMB's kernels in `effkern.backends.triton.lamb`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from effkern.backends.table import DTYPES, STEP
from effkern.backends.triton import lamb, multi_tensor
from effkern.backends.triton.checks import check_lists, check_number
from effkern.backends.triton.launch import COMPILER_OPTIONS, device_guard
from effkern.backends.triton.multi_tensor import (
    chunk_tensor,
    count_step,
    next_step,
    table_row,
    update_chunk,
)
from effkern.backends.triton.numerics import TRITON_DTYPE, accumulation_dtype, scalar
from effkern.backends.triton.rules import NUMBERS, RULES, Form, Rule, lamb_advance


def _name(specialization: Any) -> str:
    """What profilers call the compiled kernel: the rule's function."""
    return str(specialization.constants["UPDATE"].__name__)


# Triton rounds a Python float to float32 unless the argument is annotated, and float64 parameters
# need all of it.
@triton.jit(repr=_name)
def step_kernel(
    table,
    chunks,
    workspace,
    corrections,
    lr_tensor,
    grad_scale,
    found_inf,
    lr: tl.float64,
    correction1: tl.float64,
    correction2: tl.float64,
    number0: tl.float64,
    number1: tl.float64,
    number2: tl.float64,
    number3: tl.float64,
    number4: tl.float64,
    number5: tl.float64,
    number6: tl.float64,
    number7: tl.float64,
    SCALARS: tl.constexpr,
    OF_STEP: tl.constexpr,
    PASS: tl.constexpr,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    STEP: tl.constexpr,
    COUNTS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over one chunk of one tensor.

    A rule of one pass reads each element of parameter, gradient and states once, and writes all but
    the gradient: Adam 16 bytes and 12 per float32 element. At most 64 registers a thread for
    float32 Adam, so that half of all threads are resident: with one 16-byte access per tensor and
    thread in flight that is more than the latency of memory asks for.

    workspace: None, or what one launch leaves for another. corrections: None, or float64
    (tensors, 2) where the tensors' steps differ. lr_tensor, grad_scale, found_inf: None, or the
    addresses of one number. SCALARS, OF_STEP and UPDATE are the rule's scalars, device_corrections
    and update; PASS does the work with them. STEP: the dtype of the counters if they lie on the
    device, else None; they are increased in the launch that COUNTS.
    """
    skipped = False
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0
    if skipped:
        return
    row = table_row(table, chunks)
    numbers = (
        scalar(number0, tl.float64),
        scalar(number1, tl.float64),
        scalar(number2, tl.float64),
        scalar(number3, tl.float64),
        scalar(number4, tl.float64),
        scalar(number5, tl.float64),
        scalar(number6, tl.float64),
        scalar(number7, tl.float64),
    )
    first, second = correction1, correction2
    if corrections is not None:
        pair = corrections + 2 * chunk_tensor(chunks)
        first = tl.load(pair)
        second = tl.load(pair + 1)
    if STEP is not None:
        t = next_step(row, STEP)
        if OF_STEP is not None:
            first, second = OF_STEP(t, numbers)
    if lr_tensor is not None:
        lr = tl.load(lr_tensor).to(tl.float64)
    lr = scalar(lr, tl.float64)
    scalars = SCALARS(lr, first, second, numbers, ACC)
    factor = scalar(1.0, ACC)
    if grad_scale is not None:
        factor = scalar(1.0 / tl.load(grad_scale).to(tl.float64), ACC)
    SCALED: tl.constexpr = grad_scale is not None
    PASS(row, chunks, workspace, lr, factor, scalars, UPDATE, SCALED, STATES, DTYPE, ACC, BLOCK)
    if COUNTS:
        count_step(row, t, STEP)


@triton.jit
def only_pass(
    row,
    chunks,
    workspace,
    lr,
    factor,
    scalars,
    UPDATE: tl.constexpr,
    SCALED: tl.constexpr,
    STATES: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The pass of a rule that takes one."""
    update_chunk(
        row, chunks, factor, UPDATE, scalars, True, SCALED, STATES, STATES, DTYPE, ACC, BLOCK
    )


class Keywords(NamedTuple):
    """The keyword arguments that the ops of all rules have."""

    lr: float
    lr_tensor: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None


class Counters(NamedTuple):
    """Where the step counters are and what they are made of; none are counted without ``any``."""

    any: bool
    are_double: bool
    on_device: bool


def step_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *lists: Sequence[Tensor],
    lr: float,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: Any,
) -> None:
    """``effkern::_RULE_``: one step for tensors of one dtype on one device.

    The table of addresses goes to the device at every call; `step_planned_` keeps it there.

    Args:
        rule: its name.
        params: each dense in memory.
        grads: of their dtype, device, shape and strides, and so are the states.
        lists: each list of states, empty where the options need none; then the step counters, one
            number each on the CPU or all on the parameters' device, or none at all.
        lr: learning rate.
        lr_tensor: the same in a tensor on that device or on the CPU, instead.
        grad_scale: what the gradients were multiplied by; on that device, as is ``found_inf``.
        found_inf: nothing happens where it is not 0.
        options: the rule's.

    Raises:
        RuntimeError: naming the argument, what it was and what it must be; nothing was written.
    """
    if not params:
        return
    *states, steps = lists
    form = RULES[rule].form(**options)
    kept = [state if keep else None for state, keep in zip(states, form.kept, strict=True)]
    with device_guard(params[0], f"_{rule}_"):
        named = zip(RULES[rule].states, kept, strict=True)
        check_lists(params, {"grads": grads, **{n: s for n, s in named if s is not None}}, steps)
        table = multi_tensor.build_table(params, grads, kept, steps)
        device = params[0].device
        _step(
            rule,
            form,
            table,
            multi_tensor.to_device(table, device),
            multi_tensor.to_device(
                multi_tensor.build_chunks([param.numel() for param in params]), device
            ),
            params[0].dtype,
            Counters(
                any=bool(steps),
                are_double=bool(steps) and steps[0].dtype == torch.float64,
                on_device=bool(steps) and not steps[0].is_cpu,
            ),
            Keywords(lr, lr_tensor, grad_scale, found_inf),
        )


def step_planned_(
    rule: str,
    table: Tensor,
    device_table: Tensor,
    chunks: Tensor,
    layouts: Tensor,
    moved: bool,
    *,
    lr: float,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: Any,
) -> None:
    """``effkern::_RULE_planned_``: the same with all addresses in place."""
    with device_guard(device_table, f"_{rule}_planned_"):
        if moved and device_table.data_ptr() != table.data_ptr():
            multi_tensor.upload(table, device_table)
        dtype, counters = layouts[:2].tolist()
        _step(
            rule,
            RULES[rule].form(**options),
            table,
            device_table,
            chunks,
            DTYPES[dtype],
            Counters(
                any=bool(len(table)) and bool(table[0, STEP]),
                are_double=bool(counters & 1),
                on_device=bool(counters & 2),
            ),
            Keywords(lr, lr_tensor, grad_scale, found_inf),
        )


def _step(
    rule: str,
    form: Form,
    table: Tensor,
    device_table: Tensor,
    chunks: Tensor,
    dtype: torch.dtype,
    counters: Counters,
    keywords: Keywords,
) -> None:
    """Counts where the host counts, and launches. ``chunks`` lie on the device."""
    if not len(chunks):
        return
    device = chunks.device
    keywords = _checked(keywords, device)
    by_kernel = counters.any and counters.on_device
    if keywords.found_inf is not None and counters.any and not by_kernel:
        if device.type != "cpu":
            raise RuntimeError(
                "found_inf needs step counters on the parameters' device, "
                f"{device}; the counters are on the CPU"
            )
        # In the interpreter the host may look.
        if keywords.found_inf.item() != 0:
            return
        keywords = keywords._replace(found_inf=None)
    definition = RULES[rule]
    pair, each = (1.0, 1.0), None
    if not by_kernel:
        steps = multi_tensor.count_steps(table, counters.are_double) if counters.any else [1.0]
        pair, each = _corrections(definition, form, steps, device)
    counter = (tl.float64 if counters.are_double else tl.float32) if by_kernel else None
    workspace = None
    passes: list[tuple[JITFunction, JITFunction]] = [(only_pass, definition.update)]
    if rule == "lamb":
        workspace = torch.empty((len(chunks), 2), dtype=torch.float64, device=device)
        passes = [(lamb.first_pass, lamb_advance), (lamb.second_pass, definition.update)]
    for index, (work, update) in enumerate(passes):
        step_kernel[(len(chunks),)](
            device_table,
            chunks,
            workspace,
            each,
            keywords.lr_tensor,
            keywords.grad_scale if index == 0 else None,  # only the first pass reads gradients
            keywords.found_inf,
            keywords.lr,
            *pair,
            *form.numbers,
            *[0.0] * (NUMBERS - len(form.numbers)),
            SCALARS=definition.scalars,
            OF_STEP=definition.device_corrections,
            PASS=work,
            UPDATE=update,
            STATES=sum(1 << i for i, keep in enumerate(form.kept) if keep),
            STEP=counter,
            COUNTS=by_kernel and index == len(passes) - 1,
            DTYPE=TRITON_DTYPE[dtype],
            ACC=TRITON_DTYPE[accumulation_dtype(dtype)],
            BLOCK=multi_tensor.block_size(dtype),
            num_warps=multi_tensor.WARPS,
            **COMPILER_OPTIONS,
        )


def _corrections(
    definition: Rule, form: Form, steps: Sequence[float], device: torch.device
) -> tuple[tuple[float, float], Tensor | None]:
    """The rule's two numbers of the first tensor's step; those of all where their steps differ."""
    if definition.corrections is None:
        return (1.0, 1.0), None
    pairs = {t: definition.corrections(t, form.numbers) for t in set(steps)}
    if len(pairs) == 1:
        return pairs[steps[0]], None
    # Parameters that joined late: their own numbers go to the device with every step.
    each = torch.tensor([pairs[t] for t in steps], dtype=torch.float64, device="cpu")
    return pairs[steps[0]], multi_tensor.to_device(each, device)


def _checked(keywords: Keywords, device: torch.device) -> Keywords:
    """The same, a learning rate on the CPU read; what is left in tensors is on ``device``."""
    for name, tensor in keywords._asdict().items():
        if isinstance(tensor, Tensor):
            check_number(tensor, name)
            if tensor.device == device:
                continue
            if name != "lr_tensor" or not tensor.is_cpu:
                raise RuntimeError(
                    f"{name} is on {tensor.device}; it must be on the parameters' device, {device}"
                )
            keywords = keywords._replace(lr=tensor.item(), lr_tensor=None)
    return keywords
