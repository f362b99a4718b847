"""One launch over any number of tensors: the loop over the table of addresses, for any update rule.

An update rule is a @triton.jit function

    rule(param, grad, state0, state1, state2, scalars, STATES) -> (param, state0, state1, state2)

of blocks in the accumulation type; it gives back as they came the states that it does not have. The
table and the list of chunks are those of csrc/common/multi_tensor.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

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
)
from effkern.backends.triton.numerics import to_accumulator, to_storage

_NUMEL = tl.constexpr(NUMEL)
_PARAM = tl.constexpr(PARAM)
_GRAD = tl.constexpr(GRAD)
_STATE0 = tl.constexpr(STATE0)
_STATE1 = tl.constexpr(STATE1)
_STATE2 = tl.constexpr(STATE2)
_COLUMNS = tl.constexpr(COLUMNS)
_CHUNK = tl.constexpr(CHUNK)

WARPS = 4


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
    pointer = address.to(tl.pointer_type(DTYPE))
    y = to_storage(x, DTYPE)
    if WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + offsets, y)
    else:
        tl.store(pointer + offsets, y, mask=offsets < end)


@triton.jit
def update_block(
    addresses,
    offsets,
    end,
    rule,
    scalars,
    STATES: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Reads, updates and writes one block.

    WHOLE: it lies inside the tensor, and all addresses are multiples of 16.
    """
    param_address, grad_address, address0, address1, address2 = addresses
    param = load_block(param_address, offsets, end, DTYPE, ACC, WHOLE)
    grad = load_block(grad_address, offsets, end, DTYPE, ACC, WHOLE)
    state0, state1, state2 = grad, grad, grad
    if STATES > 0:
        state0 = load_block(address0, offsets, end, DTYPE, ACC, WHOLE)
    if STATES > 1:
        state1 = load_block(address1, offsets, end, DTYPE, ACC, WHOLE)
    if STATES > 2:
        state2 = load_block(address2, offsets, end, DTYPE, ACC, WHOLE)
    param, state0, state1, state2 = rule(param, grad, state0, state1, state2, scalars, STATES)
    store_block(param_address, offsets, end, param, DTYPE, WHOLE)
    if STATES > 0:
        store_block(address0, offsets, end, state0, DTYPE, WHOLE)
    if STATES > 1:
        store_block(address1, offsets, end, state1, DTYPE, WHOLE)
    if STATES > 2:
        store_block(address2, offsets, end, state2, DTYPE, WHOLE)


@triton.jit
def chunk_tensor(chunks):
    """The index of the tensor that this program works on."""
    return tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)


@triton.jit
def update_chunk(
    table,
    chunks,
    rule,
    scalars,
    STATES: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Applies ``rule`` to this program's chunk."""
    row = table + chunk_tensor(chunks) * _COLUMNS
    begin = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * _CHUNK
    end = tl.minimum(begin + _CHUNK, tl.load(row + _NUMEL))
    param = tl.load(row + _PARAM)
    grad = tl.load(row + _GRAD)
    state0, state1, state2 = param, param, param
    if STATES > 0:
        state0 = tl.load(row + _STATE0)
    if STATES > 1:
        state1 = tl.load(row + _STATE1)
    if STATES > 2:
        state2 = tl.load(row + _STATE2)
    addresses = (param, grad, state0, state1, state2)

    whole_end = begin
    if (param | grad | state0 | state1 | state2) % 16 == 0:
        whole_end = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole_end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        update_block(addresses, offsets, end, rule, scalars, STATES, DTYPE, ACC, True)
    # Masked accesses are single elements, of which a whole block would need many registers.
    for start in range(whole_end, end, BLOCK // 2):
        offsets = start + tl.arange(0, BLOCK // 2)
        update_block(addresses, offsets, end, rule, scalars, STATES, DTYPE, ACC, False)


def block_size(dtype: torch.dtype) -> int:
    """Elements that one program handles at a time: 16 bytes of each tensor a thread."""
    return WARPS * 32 * 16 // dtype.itemsize


def build_table(
    params: Sequence[torch.Tensor], grads_and_states: Sequence[Sequence[torch.Tensor]]
) -> torch.Tensor:
    """The table of tensors that no plan describes, on the CPU; the columns of the steps stay 0.

    ``grads_and_states`` holds lists of one tensor per parameter: the gradients, then each state.
    """
    columns = [[param.numel() for param in params]]
    columns += [[tensor.data_ptr() for tensor in each] for each in (params, *grads_and_states)]
    table = torch.zeros(len(params), COLUMNS, dtype=torch.int64)
    table[:, : len(columns)] = torch.tensor(columns).T
    return table


def build_chunks(numels: Sequence[int]) -> torch.Tensor:
    """int32 (chunks, 2) on the CPU: the tensor and the chunk of it that each program handles."""
    rows = [
        (tensor, chunk)
        for tensor, numel in enumerate(numels)
        for chunk in range(-(-numel // CHUNK))
    ]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 2)


def upload(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies CPU memory to the device, on the current stream and without waiting for it."""
    if target.is_cuda:
        # A page-locked copy: the caller may write to ``source`` before the device has read it.
        source = source.clone().pin_memory()
    target.copy_(source, non_blocking=True)


def count_steps(table: torch.Tensor, float64: bool) -> list[float]:
    """Adds 1 to each tensor's step counter, in the CPU's memory, and gives the new values."""
    number = ctypes.c_double if float64 else ctypes.c_float
    steps = []
    for address in table[:, STEP].tolist():
        counter = number.from_address(address)
        counter.value += 1
        steps.append(counter.value)
    return steps
