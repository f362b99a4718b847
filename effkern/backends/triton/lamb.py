"""LAMB's two passes, whose step is scaled by norms of the whole tensor.

The first moves the states on and sums the squares of each chunk of the parameter and of its
direction; the last program of a tensor adds those up. The second goes along the direction, computed
again from the states. Per float32 element 16 bytes are read and 8 written, then 12 and 4.

The sums are taken in a fixed order, but in another one where a tensor does not lie at a multiple of
16 bytes: the last digits of the norms, and with them of the step, are then others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effkern.backends.table import RATIO
from effkern.backends.triton.multi_tensor import (
    addresses_of,
    bits_of,
    chunk_index,
    chunk_range,
    finishes_tensor,
    load_block,
    store_block,
    tensor_programs,
    update_chunk,
)
from effkern.backends.triton.numerics import to_accumulator, to_storage
from effkern.backends.triton.rules import lamb_direction

_RATIO = tl.constexpr(RATIO)
_SUMMED = tl.constexpr(256)


@triton.jit
def advance_block(
    addresses,
    offsets,
    end,
    factor,
    advance,
    scalars,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Moves the states of one block on; gives the squares of its parameter and direction."""
    param_address, grad_address, address0, address1, _ = addresses
    param = load_block(param_address, offsets, end, DTYPE, ACC, WHOLE)
    grad = load_block(grad_address, offsets, end, DTYPE, ACC, WHOLE)
    exp_avg = load_block(address0, offsets, end, DTYPE, ACC, WHOLE)
    exp_avg_sq = load_block(address1, offsets, end, DTYPE, ACC, WHOLE)
    if SCALED:
        grad = grad * factor
    exp_avg, exp_avg_sq = advance(grad, exp_avg, exp_avg_sq, scalars)
    store_block(address0, offsets, end, exp_avg, DTYPE, WHOLE)
    store_block(address1, offsets, end, exp_avg_sq, DTYPE, WHOLE)
    # As the second pass will read them.
    exp_avg = to_accumulator(to_storage(exp_avg, DTYPE), ACC)
    exp_avg_sq = to_accumulator(to_storage(exp_avg_sq, DTYPE), ACC)
    direction = lamb_direction(param, exp_avg, exp_avg_sq, scalars)
    param_squares, direction_squares = param * param, direction * direction
    if not WHOLE:
        param_squares = tl.where(offsets < end, param_squares, 0.0)
        direction_squares = tl.where(offsets < end, direction_squares, 0.0)
    return param_squares, direction_squares


@triton.jit
def advance_blocks(
    begin,
    stop,
    addresses,
    end,
    factor,
    advance,
    scalars,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for the blocks from ``begin`` to ``stop``; gives the two sums, in float64."""
    # A lane sums at most as many squares as a chunk has blocks: few enough for float32.
    params = tl.zeros((BLOCK,), ACC)
    directions = tl.zeros((BLOCK,), ACC)
    for start in range(begin, stop, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        param, direction = advance_block(
            addresses, offsets, end, factor, advance, scalars, SCALED, DTYPE, ACC, WHOLE
        )
        params += param
        directions += direction
    return tl.sum(params.to(tl.float64), axis=0), tl.sum(directions.to(tl.float64), axis=0)


@triton.jit
def sum_of_chunks(sums, count):
    """The sums of ``count`` pairs, in a fixed order."""
    params = tl.zeros((_SUMMED,), tl.float64)
    directions = tl.zeros((_SUMMED,), tl.float64)
    for start in range(0, count, _SUMMED):
        chunk = start + tl.arange(0, _SUMMED)
        params += tl.load(sums + 2 * chunk, mask=chunk < count, other=0.0)
        directions += tl.load(sums + 2 * chunk + 1, mask=chunk < count, other=0.0)
    return tl.sum(params, axis=0), tl.sum(directions, axis=0)


@triton.jit
def put_step_size(row, chunks, workspace, lr, params, directions, ACC: tl.constexpr):
    """The tensor's last program to come here leaves lr * trust ratio in its row.

    params, directions: this program's sums of squares. The trust ratio is 1 where a norm is 0.
    """
    of_chunk = workspace + 2 * tl.program_id(0).to(tl.int64)
    tl.store(of_chunk, params)
    tl.store(of_chunk + 1, directions)
    if finishes_tensor(row):
        # A tensor's programs are neighbours.
        of_tensor = of_chunk - 2 * chunk_index(chunks)
        params, directions = sum_of_chunks(of_tensor, tensor_programs(row))
        ratio = tl.sqrt(params) / tl.sqrt(directions)
        step_size = lr * tl.where((params == 0) | (directions == 0), 1.0, ratio)
        tl.store((row + _RATIO).to(tl.pointer_type(ACC)), step_size.to(ACC))


@triton.jit
def step_size_of(row, ACC: tl.constexpr):
    """What it left there."""
    return tl.load((row + _RATIO).to(tl.pointer_type(ACC)))


@triton.jit
def first_pass(
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
    """Advances this program's chunk; the tensor's last program leaves lr * trust ratio in its row.

    workspace: float64 (chunks, 2). UPDATE: the rule's advance.
    """
    addresses = addresses_of(row, True, STATES)
    begin, whole_end, end = chunk_range(row, chunks, bits_of(addresses), BLOCK)
    params, directions = advance_blocks(
        begin, whole_end, addresses, end, factor, UPDATE, scalars,
        SCALED, DTYPE, ACC, True, BLOCK,
    )  # fmt: skip
    more_params, more_directions = advance_blocks(
        whole_end, end, addresses, end, factor, UPDATE, scalars,
        SCALED, DTYPE, ACC, False, BLOCK // 2,
    )  # fmt: skip
    put_step_size(
        row, chunks, workspace, lr, params + more_params, directions + more_directions, ACC
    )


@triton.jit
def second_pass(
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
    """Updates the parameter of this program's chunk; gradients are not read."""
    both = (step_size_of(row, ACC), scalars)
    update_chunk(row, chunks, factor, UPDATE, both, False, False, STATES, 0, DTYPE, ACC, BLOCK)
