"""The pass over tensors that are not all stored as the parameter is: states in another dtype or in
8 bits, float32 masters, stochastic rounding.

Still each byte is read once and each written once: with masters the parameter is written only. A
block is rows of 256 elements, those that share a scale where states have 8 bits. A thread has
16 bytes at once of the widest tensor. For Adam that takes at most 64 registers, but up to 80
where the parameter has 2 bytes and states 8 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effkern.backends.table import KEY, MASTER, QUANTIZED_BLOCK, SCALE0, SCALE1, SCALE2
from effkern.backends.triton.multi_tensor import (
    addresses_of,
    bits_of,
    chunk_range,
    load_block,
    store_block,
    store_rounded,
)
from effkern.backends.triton.numerics import to_accumulator, to_storage
from effkern.backends.triton.quantize import dequantized, quantized, scales_of
from effkern.backends.triton.rounding import rounded_stochastically, rounding_seed

_MASTER = tl.constexpr(MASTER)
_SCALE0 = tl.constexpr(SCALE0)
_SCALE1 = tl.constexpr(SCALE1)
_SCALE2 = tl.constexpr(SCALE2)
_KEY = tl.constexpr(KEY)
_ROW = tl.constexpr(QUANTIZED_BLOCK)


@triton.jit
def source_of(row, param, STORAGE: tl.constexpr):
    """The address of what the parameter is read from: its master, or itself."""
    source = param
    if STORAGE.masters:
        source = tl.load(row + _MASTER)
    return source


@triton.jit
def scale_addresses(row, STATES: tl.constexpr, STORAGE: tl.constexpr):
    """Of the three states' scales; the row's where there are none."""
    scales0, scales1, scales2 = row, row, row
    if STORAGE.state == tl.int8:
        if STATES & 1:
            scales0 = tl.load(row + _SCALE0).to(tl.pointer_type(tl.float32))
        if STATES & 2:
            scales1 = tl.load(row + _SCALE1).to(tl.pointer_type(tl.float32))
        if STATES & 4:
            scales2 = tl.load(row + _SCALE2).to(tl.pointer_type(tl.float32))
    return scales0, scales1, scales2


@triton.jit
def offsets_of(start, ROWS: tl.constexpr):
    """The places of ROWS rows of elements."""
    return start + tl.arange(0, ROWS)[:, None] * _ROW + tl.arange(0, _ROW)[None, :]


@triton.jit
def load_scales(scales, start, end, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """The scales of the rows that begin at ``start``."""
    place = start // _ROW + tl.arange(0, ROWS)
    if WHOLE:
        found = tl.load(scales + place)
    else:
        found = tl.load(scales + place, mask=place * _ROW < end)
    return found


@triton.jit
def load_state(
    address,
    scales,
    start,
    end,
    INDEX: tl.constexpr,
    STORAGE: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """State INDEX of a block of rows."""
    offsets = offsets_of(start, ROWS)
    SIGNED: tl.constexpr = STORAGE.signed >> INDEX & 1
    if STORAGE.state == tl.int8:
        if SIGNED:
            codes = load_block(address, offsets, end, tl.int8, tl.float32, WHOLE)
        else:
            codes = load_block(address, offsets, end, tl.uint8, tl.float32, WHOLE)
        x = dequantized(codes, load_scales(scales, start, end, ROWS, WHOLE), SIGNED)
    else:
        x = load_block(address, offsets, end, STORAGE.state, tl.float32, WHOLE)
    return x


@triton.jit
def store_state(
    address,
    scales,
    start,
    end,
    x,
    INDEX: tl.constexpr,
    STORAGE: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Writes it; gives it as it will be read."""
    offsets = offsets_of(start, ROWS)
    SIGNED: tl.constexpr = STORAGE.signed >> INDEX & 1
    if STORAGE.state == tl.int8:
        if not WHOLE:
            x = tl.where(offsets < end, x, 0.0)
        new = scales_of(x)
        codes = quantized(x, new, SIGNED)
        place = start // _ROW + tl.arange(0, ROWS)
        if WHOLE:
            tl.store(scales + place, new)
        else:
            tl.store(scales + place, new, mask=place * _ROW < end)
        store_rounded(address, offsets, end, codes, codes.dtype, WHOLE)
        stored = dequantized(codes.to(tl.float32), new, SIGNED)
    else:
        y = to_storage(x, STORAGE.state)
        store_rounded(address, offsets, end, y, STORAGE.state, WHOLE)
        stored = to_accumulator(y, tl.float32)
    return stored


@triton.jit
def load_states(
    addresses,
    scales,
    start,
    end,
    like,
    STATES: tl.constexpr,
    STORAGE: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The states that are kept; ``like`` for the others."""
    _, _, address0, address1, address2 = addresses
    scales0, scales1, scales2 = scales
    state0, state1, state2 = like, like, like
    if STATES & 1:
        state0 = load_state(address0, scales0, start, end, 0, STORAGE, ROWS, WHOLE)
    if STATES & 2:
        state1 = load_state(address1, scales1, start, end, 1, STORAGE, ROWS, WHOLE)
    if STATES & 4:
        state2 = load_state(address2, scales2, start, end, 2, STORAGE, ROWS, WHOLE)
    return state0, state1, state2


@triton.jit
def update_rows(
    addresses,
    source,
    scales,
    start,
    end,
    factor,
    seed,
    rule,
    scalars,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    STATES: tl.constexpr,
    WRITTEN: tl.constexpr,
    STORAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Reads, updates and writes ROWS rows; WHOLE: as in multi_tensor."""
    param_address, grad_address, address0, address1, address2 = addresses
    scales0, scales1, scales2 = scales
    offsets = offsets_of(start, ROWS)
    param = load_block(source, offsets, end, STORAGE.param, tl.float32, WHOLE)
    grad = param
    if GRADIENT:
        grad = load_block(grad_address, offsets, end, DTYPE, tl.float32, WHOLE)
    if SCALED:
        grad = grad * factor
    state0, state1, state2 = load_states(
        addresses, scales, start, end, grad, STATES, STORAGE, ROWS, WHOLE
    )
    param, state0, state1, state2 = rule(param, grad, state0, state1, state2, scalars, STATES)
    if STORAGE.masters:
        store_block(source, offsets, end, param, STORAGE.param, WHOLE)
    if STORAGE.stochastic:
        rounded = rounded_stochastically(param, seed, start, offsets)
        store_rounded(param_address, offsets, end, rounded, DTYPE, WHOLE)
    else:
        store_block(param_address, offsets, end, param, DTYPE, WHOLE)
    if WRITTEN & 1:
        store_state(address0, scales0, start, end, state0, 0, STORAGE, ROWS, WHOLE)
    if WRITTEN & 2:
        store_state(address1, scales1, start, end, state1, 1, STORAGE, ROWS, WHOLE)
    if WRITTEN & 4:
        store_state(address2, scales2, start, end, state2, 2, STORAGE, ROWS, WHOLE)


@triton.jit
def update_mixed_chunk(
    row,
    chunks,
    factor,
    t,
    rule,
    scalars,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    STATES: tl.constexpr,
    WRITTEN: tl.constexpr,
    STORAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Applies ``rule`` to this program's chunk, as `multi_tensor.update_chunk`.

    t: the number of the step, of which the random bits of stochastic rounding are made.
    """
    seed = t
    if STORAGE.stochastic:
        seed = rounding_seed(tl.load(row + _KEY), t)
    addresses = addresses_of(row, GRADIENT, STATES)
    source = source_of(row, addresses[0], STORAGE)
    scales = scale_addresses(row, STATES, STORAGE)
    begin, whole_end, end = chunk_range(row, chunks, bits_of(addresses) | source, BLOCK)
    for start in range(begin, whole_end, BLOCK):
        update_rows(
            addresses, source, scales, start, end, factor, seed, rule, scalars,
            GRADIENT, SCALED, STATES, WRITTEN, STORAGE, DTYPE, BLOCK // _ROW, True,
        )  # fmt: skip
    for start in range(whole_end, end, BLOCK // 2):
        update_rows(
            addresses, source, scales, start, end, factor, seed, rule, scalars,
            GRADIENT, SCALED, STATES, WRITTEN, STORAGE, DTYPE, BLOCK // 2 // _ROW, False,
        )  # fmt: skip


@triton.jit
def mixed_pass(
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
    update_mixed_chunk(
        row, chunks, factor, t, UPDATE, scalars,
        True, SCALED, STATES, STATES, STORAGE, DTYPE, BLOCK,
    )  # fmt: skip
