"""One step of an update rule in Triton: one launch for all parameters, two for LAMB.

The rules are in `effkern.backends.triton.rules`; what a program does with its elements is in
multi_tensor.py, mixed.py, lamb.py and mixed_lamb.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from effkern.backends.table import DTYPES, GRAD, KEY, MASTER, PARAM, SCALE0, STATE0, STEP
from effkern.backends.triton import lamb, multi_tensor
from effkern.backends.triton.checks import (
    check_lists,
    check_number,
    check_scales,
    check_squares,
    check_storage,
)
from effkern.backends.triton.launch import COMPILER_OPTIONS, device_guard
from effkern.backends.triton.mixed import mixed_pass
from effkern.backends.triton.mixed_lamb import mixed_first_pass, mixed_second_pass
from effkern.backends.triton.multi_tensor import (
    chunk_tensor,
    count_step,
    next_step,
    table_row,
    update_chunk,
)
from effkern.backends.triton.numerics import TRITON_DTYPE, accumulation_dtype, scalar
from effkern.backends.triton.rules import (
    NUMBERS,
    RULES,
    Form,
    Rule,
    lamb_advance,
    lamb_update,
)
from effkern.backends.triton.squares import clipping_factor
from effkern.backends.triton.storage import Storage, of_layouts, of_lists


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
    squares,
    squares_count,
    max_norm: tl.float64,
    lr: tl.float64,
    correction1: tl.float64,
    correction2: tl.float64,
    step: tl.float64,
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
    STORAGE: tl.constexpr,
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
    (tensors, 3) where the tensors' steps differ: both corrections, and the step. lr_tensor,
    grad_scale, found_inf: None, or the addresses of one number. squares: None, or the address of
    squares_count numbers. SCALARS, OF_STEP and UPDATE are the rule's scalars, device_corrections
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
    first, second, t = correction1, correction2, scalar(step, tl.float64)
    if corrections is not None:
        of_tensor = corrections + 3 * chunk_tensor(chunks)
        if OF_STEP is not None:
            first = tl.load(of_tensor)
            second = tl.load(of_tensor + 1)
        if STORAGE.stochastic:
            t = tl.load(of_tensor + 2)
    if STEP is not None:
        t = next_step(row, STEP)
        if OF_STEP is not None:
            first, second = OF_STEP(t, numbers)
    if lr_tensor is not None:
        lr = tl.load(lr_tensor).to(tl.float64)
    lr = scalar(lr, tl.float64)
    scalars = SCALARS(lr, first, second, numbers, ACC)
    factor, scale = scalar(1.0, ACC), scalar(1.0, tl.float64)
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float64)
        factor = scalar(1.0 / scale, ACC)
    if squares is not None:
        factor = scalar(clipping_factor(squares, squares_count, scale, max_norm), ACC)
    SCALED: tl.constexpr = grad_scale is not None or squares is not None
    PASS(
        row, chunks, workspace, lr, factor, t, scalars,
        UPDATE, SCALED, STATES, STORAGE, DTYPE, ACC, BLOCK,
    )  # fmt: skip
    if COUNTS:
        count_step(row, t, STEP)


@triton.jit
def only_pass(
    row,
    chunks,
    workspace,
    lr,
    factor,
    t,
    scalars,
    UPDATE: tl.constexpr,
    SCALED: tl.constexpr,
    STATES: tl.constexpr,
    STORAGE: tl.constexpr,
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
    squares: Tensor | None
    max_norm: float


class Counters(NamedTuple):
    """Where the step counters are and what they are made of; none are counted without ``any``."""

    any: bool
    are_double: bool
    on_device: bool


def step_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *lists: Any,
    lr: float,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    squares: Tensor | None = None,
    max_norm: float = 0.0,
    **options: Any,
) -> None:
    """``effkern::_RULE_``: one step for tensors of one dtype on one device.

    The table of addresses goes to the device at every call; `step_planned_` keeps it there.

    Args:
        rule: its name.
        params: each dense in memory.
        grads: of their dtype, device, shape and strides; but for their dtype, so are the states.
        lists: each list of states, empty where the options need none; the step counters, one
            number each on the CPU or all on the parameters' device, or none at all; float32
            masters, or none; the scales of states in 8 bits; keys of stochastic rounding, or none.
        lr: learning rate.
        lr_tensor: the same in a tensor on that device or on the CPU, instead.
        grad_scale: what the gradients were multiplied by; on that device, as are the next two.
        found_inf: nothing happens where it is not 0.
        squares: float64, one dimension: they add up to the sum of squares of all gradients, which
            are clipped.
        max_norm: to which norm.
        options: the rule's.

    Raises:
        RuntimeError: naming the argument, what it was and what it must be; nothing was written.
    """
    if not params:
        return
    *states, steps, masters, scales, keys = lists
    definition = RULES[rule]
    form = definition.form(**options)
    kept = [i for i, keep in enumerate(form.kept) if keep]
    names, signed = list(definition.states), list(definition.states.values())
    with device_guard(params[0], f"_{rule}_"):
        storage = of_lists(params, [states[i] for i in kept], signed, masters, keys)
        checked = {"grads": (grads, params[0].dtype)}
        checked |= {names[i]: (states[i], storage.dtype_of_state(i)) for i in kept}
        checked |= {"masters": (masters, torch.float32)} if masters else {}
        check_lists(params, checked, steps)
        check_storage(storage, params, keys)
        columns = {PARAM: params, GRAD: grads, STEP: steps, MASTER: masters}
        columns |= {STATE0 + i: states[i] for i in kept}
        if storage.quantized:
            check_scales(scales, params, len(kept))
            of_state = [scales[k * len(params) :][: len(params)] for k in range(len(kept))]
            columns |= {SCALE0 + i: some for i, some in zip(kept, of_state, strict=True)}
        numels = [param.numel() for param in params]
        table = multi_tensor.build_table(numels, columns)
        if keys:
            table[:, KEY] = torch.tensor(keys, dtype=torch.int64, device="cpu")
        device = params[0].device
        _step(
            rule,
            form,
            storage,
            table,
            multi_tensor.to_device(table, device),
            multi_tensor.to_device(multi_tensor.build_chunks(numels), device),
            params[0].dtype,
            Counters(
                any=bool(steps),
                are_double=bool(steps) and steps[0].dtype == torch.float64,
                on_device=bool(steps) and not steps[0].is_cpu,
            ),
            Keywords(lr, lr_tensor, grad_scale, found_inf, squares, max_norm),
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
    squares: Tensor | None = None,
    max_norm: float = 0.0,
    **options: Any,
) -> None:
    """``effkern::_RULE_planned_``: the same with all addresses in place."""
    with device_guard(device_table, f"_{rule}_planned_"):
        multi_tensor.refresh(table, device_table, moved)
        header = layouts[:4].tolist()
        dtype, counters = header[:2]
        definition = RULES[rule]
        _step(
            rule,
            definition.form(**options),
            of_layouts(header, list(definition.states.values())),
            table,
            device_table,
            chunks,
            DTYPES[dtype],
            Counters(
                any=bool(len(table)) and bool(table[0, STEP]),
                are_double=bool(counters & 1),
                on_device=bool(counters & 2),
            ),
            Keywords(lr, lr_tensor, grad_scale, found_inf, squares, max_norm),
        )


def _passes(rule: str, storage: Storage) -> list[tuple[JITFunction, JITFunction, bool]]:
    """Of each launch: its pass, its update, and whether it reads gradients."""
    if rule != "lamb":
        return [(only_pass if storage.plain else mixed_pass, RULES[rule].update, True)]
    if storage.plain:
        return [(lamb.first_pass, lamb_advance, True), (lamb.second_pass, lamb_update, False)]
    return [(mixed_first_pass, lamb_advance, True), (mixed_second_pass, lamb_update, False)]


def _step(
    rule: str,
    form: Form,
    storage: Storage,
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
    of_step, each = (1.0, 1.0, 1.0), None
    if not by_kernel:
        steps = multi_tensor.count_steps(table, counters.are_double) if counters.any else [1.0]
        of_step, each = _corrections(definition, form, storage, steps, device)
    counter = (tl.float64 if counters.are_double else tl.float32) if by_kernel else None
    workspace = None
    if rule == "lamb":
        workspace = torch.empty((len(chunks), 2), dtype=torch.float64, device=device)
    passes = _passes(rule, storage)
    for index, (work, update, reads_gradients) in enumerate(passes):
        squares = keywords.squares if reads_gradients else None
        step_kernel[(len(chunks),)](
            device_table,
            chunks,
            workspace,
            each,
            keywords.lr_tensor,
            keywords.grad_scale if reads_gradients else None,
            keywords.found_inf,
            squares,
            None if squares is None else len(squares),
            keywords.max_norm,
            keywords.lr,
            *of_step,
            *form.numbers,
            *[0.0] * (NUMBERS - len(form.numbers)),
            SCALARS=definition.scalars,
            OF_STEP=definition.device_corrections,
            PASS=work,
            UPDATE=update,
            STATES=sum(1 << i for i, keep in enumerate(form.kept) if keep),
            STORAGE=storage,
            STEP=counter,
            COUNTS=by_kernel and index == len(passes) - 1,
            DTYPE=TRITON_DTYPE[dtype],
            ACC=TRITON_DTYPE[accumulation_dtype(dtype)],
            BLOCK=multi_tensor.block_size(storage.widest(dtype)),
            num_warps=multi_tensor.WARPS,
            **COMPILER_OPTIONS,
        )


def _corrections(
    definition: Rule, form: Form, storage: Storage, steps: Sequence[float], device: torch.device
) -> tuple[tuple[float, float, float], Tensor | None]:
    """The rule's two numbers of the first tensor's step, and the step; those of all where their
    steps differ and are asked for.
    """
    host = definition.corrections
    found = {t: (*((1.0, 1.0) if host is None else host(t, form.numbers)), t) for t in set(steps)}
    if len(found) == 1 or (host is None and not storage.stochastic):
        return found[steps[0]], None
    # Parameters that joined late: their own numbers go to the device with every step.
    each = torch.tensor([found[t] for t in steps], dtype=torch.float64, device="cpu")
    return found[steps[0]], multi_tensor.to_device(each, device)


def _checked(keywords: Keywords, device: torch.device) -> Keywords:
    """The same, a learning rate on the CPU read; what is left in tensors is on ``device``."""
    for name, tensor in keywords._asdict().items():
        if name == "squares" and tensor is not None:
            check_squares(tensor, device)
        elif isinstance(tensor, Tensor):
            check_number(tensor, name)
            if tensor.device == device:
                continue
            if name != "lr_tensor" or not tensor.is_cpu:
                raise RuntimeError(
                    f"{name} is on {tensor.device}; it must be on the parameters' device, {device}"
                )
            keywords = keywords._replace(lr=tensor.item(), lr_tensor=None)
    return keywords
