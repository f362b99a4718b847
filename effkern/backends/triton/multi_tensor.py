"""One launch over any number of tensors: the loop over the table of addresses, for any update rule.

The rules are those of `effkern.backends.triton.rules`; the table and the list of chunks are those
of csrc/common/multi_tensor.h. A number in the table that the kernels write lies in the device's
copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from effkern.backends.table import (
    CHUNK,
    COLUMNS,
    GRAD,
    NUMEL,
    PARAM,
    STATE0,
    STATE1,
    STATE2,
    STEP,
    TICKET,
)
from effkern.backends.triton.numerics import to_accumulator, to_storage

_NUMEL = tl.constexpr(NUMEL)
_PARAM = tl.constexpr(PARAM)
_GRAD = tl.constexpr(GRAD)
_STATE0 = tl.constexpr(STATE0)
_STATE1 = tl.constexpr(STATE1)
_STATE2 = tl.constexpr(STATE2)
_STEP = tl.constexpr(STEP)
_TICKET = tl.constexpr(TICKET)
_COLUMNS = tl.constexpr(COLUMNS)
_CHUNK = tl.constexpr(CHUNK)

WARPS = 4

# ---- what a program finds before its elements ----


@triton.jit
def table_row(table, chunks):
    """The row of the tensor that this program works on."""
    return table + chunk_tensor(chunks) * _COLUMNS


@triton.jit
def chunk_tensor(chunks):
    """The index of that tensor."""
    return tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)


@triton.jit
def chunk_index(chunks):
    """Which of the tensor's chunks this program works on."""
    return tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64)


@triton.jit
def next_step(row, STEP: tl.constexpr):
    """The number of the step under way, float64; STEP is the dtype of the device's counter."""
    return tl.load(tl.load(row + _STEP).to(tl.pointer_type(STEP))).to(tl.float64) + 1.0


@triton.jit
def count_step(row, t, STEP: tl.constexpr):
    """Writes the counter, once all programs of the tensor have read it."""
    if finishes_tensor(row):
        tl.store(tl.load(row + _STEP).to(tl.pointer_type(STEP)), t.to(STEP))


@triton.jit
def tensor_programs(row):
    """How many programs work on the tensor; an empty one has one, which counts its step."""
    return tl.maximum((tl.load(row + _NUMEL) + _CHUNK - 1) // _CHUNK, 1)


@triton.jit
def finishes_tensor(row):
    """Whether all other programs of the tensor have come here before this one.

    What they wrote before it can then be read.
    """
    return draws_last_ticket(row, tensor_programs(row))


@triton.jit
def draws_last_ticket(row, count):
    """The same for ``count`` programs that have the ticket in this row."""
    tl.debug_barrier()  # it is drawn by one thread, for all of them
    last = tl.atomic_add(row + _TICKET, 1) == count - 1
    if last:
        tl.store(row + _TICKET, 0)
    return last


@triton.jit
def addresses_of(row, GRADIENT: tl.constexpr, STATES: tl.constexpr):
    """Of parameter, gradient and three states; the parameter's where there is none."""
    param = tl.load(row + _PARAM)
    grad, state0, state1, state2 = param, param, param, param
    if GRADIENT:
        grad = tl.load(row + _GRAD)
    if STATES & 1:
        state0 = tl.load(row + _STATE0)
    if STATES & 2:
        state1 = tl.load(row + _STATE1)
    if STATES & 4:
        state2 = tl.load(row + _STATE2)
    return param, grad, state0, state1, state2


@triton.jit
def bits_of(addresses):
    """Those that are set in any of five addresses."""
    param, grad, state0, state1, state2 = addresses
    return param | grad | state0 | state1 | state2


@triton.jit
def chunk_range(row, chunks, bits, BLOCK: tl.constexpr):
    """Of this program's elements: the first, where whole blocks of BLOCK end, and the end.

    There are whole blocks only where all addresses, whose ``bits`` together these are, are
    multiples of 16.
    """
    begin = chunk_index(chunks) * _CHUNK
    end = tl.minimum(begin + _CHUNK, tl.load(row + _NUMEL))
    whole_end = begin
    if bits % 16 == 0:
        whole_end = begin + (end - begin) // BLOCK * BLOCK
    return begin, whole_end, end


# ---- elements ----


@triton.jit
def load_block(address, offsets, end, DTYPE: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr):
    """One block of the tensor at ``address``; WHOLE as in `update_block`."""
    # The cast stands here, not where the address is read: the promise of alignment belongs to this
    # branch alone.
    pointer = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        x = tl.load(tl.multiple_of(pointer, 16) + offsets)
    else:
        x = tl.load(pointer + offsets, mask=offsets < end)
    return to_accumulator(x, ACC)


@triton.jit
def store_block(address, offsets, end, x, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Writes one block, rounded to DTYPE."""
    store_rounded(address, offsets, end, to_storage(x, DTYPE), DTYPE, WHOLE)


@triton.jit
def store_rounded(address, offsets, end, y, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Writes one block that is of DTYPE."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + offsets, y)
    else:
        tl.store(pointer + offsets, y, mask=offsets < end)


@triton.jit
def update_block(
    addresses,
    offsets,
    end,
    factor,
    rule,
    scalars,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    STATES: tl.constexpr,
    WRITTEN: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Reads, updates and writes one block.

    WHOLE: it lies inside the tensor, and all addresses are multiples of 16.
    """
    param_address, grad_address, address0, address1, address2 = addresses
    param = load_block(param_address, offsets, end, DTYPE, ACC, WHOLE)
    grad = param
    if GRADIENT:
        grad = load_block(grad_address, offsets, end, DTYPE, ACC, WHOLE)
    if SCALED:
        grad = grad * factor
    state0, state1, state2 = grad, grad, grad
    if STATES & 1:
        state0 = load_block(address0, offsets, end, DTYPE, ACC, WHOLE)
    if STATES & 2:
        state1 = load_block(address1, offsets, end, DTYPE, ACC, WHOLE)
    if STATES & 4:
        state2 = load_block(address2, offsets, end, DTYPE, ACC, WHOLE)
    param, state0, state1, state2 = rule(param, grad, state0, state1, state2, scalars, STATES)
    store_block(param_address, offsets, end, param, DTYPE, WHOLE)
    if WRITTEN & 1:
        store_block(address0, offsets, end, state0, DTYPE, WHOLE)
    if WRITTEN & 2:
        store_block(address1, offsets, end, state1, DTYPE, WHOLE)
    if WRITTEN & 4:
        store_block(address2, offsets, end, state2, DTYPE, WHOLE)


@triton.jit
def update_chunk(
    row,
    chunks,
    factor,
    rule,
    scalars,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    STATES: tl.constexpr,
    WRITTEN: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Applies ``rule`` to this program's chunk of the tensor in ``row``.

    factor: of the gradients, where they are SCALED. rule: a rule's update. GRADIENT: whether it
    needs the gradient; otherwise it gets the parameter instead. STATES, WRITTEN: masks of the
    states that are read and written.
    """
    addresses = addresses_of(row, GRADIENT, STATES)
    begin, whole_end, end = chunk_range(row, chunks, bits_of(addresses), BLOCK)
    for start in range(begin, whole_end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        update_block(
            addresses, offsets, end, factor, rule, scalars,
            GRADIENT, SCALED, STATES, WRITTEN, DTYPE, ACC, True,
        )  # fmt: skip
    # Masked accesses are single elements, of which a whole block would need many registers.
    for start in range(whole_end, end, BLOCK // 2):
        offsets = start + tl.arange(0, BLOCK // 2)
        update_block(
            addresses, offsets, end, factor, rule, scalars,
            GRADIENT, SCALED, STATES, WRITTEN, DTYPE, ACC, False,
        )  # fmt: skip


# ---- the host's part ----


def block_size(itemsize: int) -> int:
    """Elements that one program handles at a time: 16 bytes a thread of the widest tensor."""
    return WARPS * 32 * 16 // itemsize


def build_table(
    numels: Sequence[int], columns: Mapping[int, Sequence[torch.Tensor]]
) -> torch.Tensor:
    """The table of tensors that no plan describes, on the CPU.

    Args:
        numels: the lengths of the tensors.
        columns: for each column of addresses the tensors there, one for each length, or none.
    """
    table = torch.zeros(len(numels), COLUMNS, dtype=torch.int64, device="cpu")
    table[:, NUMEL] = _int64(numels)
    for column, tensors in columns.items():
        if tensors:
            table[:, column] = _int64([tensor.data_ptr() for tensor in tensors])
    return table


def build_chunks(numels: Sequence[int]) -> torch.Tensor:
    """int32 (chunks, 2) on the CPU: the tensor and the chunk of it that each program handles."""
    rows = [
        (tensor, chunk)
        for tensor, numel in enumerate(numels)
        for chunk in range(max(1, -(-numel // CHUNK)))
    ]
    return torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, 2)


def upload(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies CPU memory to the device, on the current stream and without waiting for it."""
    if target.is_cuda:
        # A page-locked copy: the caller may write to ``source`` before the device has read it.
        source = source.clone().pin_memory()
    target.copy_(source, non_blocking=True)


def refresh(table: torch.Tensor, device_table: torch.Tensor, moved: bool) -> None:
    """Brings a plan's table on the device up to date, if the one on the CPU has ``moved`` on."""
    if moved and device_table.data_ptr() != table.data_ptr():
        upload(table, device_table)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, in the same way."""
    target = torch.empty_like(tensor, device=device)
    upload(tensor, target)
    return target


def count_steps(table: torch.Tensor, float64: bool) -> list[float]:
    """Adds 1 to each tensor's step counter, in the CPU's memory, and gives the new values."""
    number = ctypes.c_double if float64 else ctypes.c_float
    steps = []
    for address in table[:, STEP].tolist():
        counter = number.from_address(address)
        counter.value += 1
        steps.append(counter.value)
    return steps


def _int64(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
