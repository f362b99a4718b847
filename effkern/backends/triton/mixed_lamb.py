"""LAMB's two passes over tensors that are not all stored as the parameter is: as in lamb.py.

Both make the direction of the states as they are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effkern.backends.table import QUANTIZED_BLOCK
from effkern.backends.triton.lamb import put_step_size, step_size_of
from effkern.backends.triton.mixed import (
    load_states,
    offsets_of,
    scale_addresses,
    source_of,
    store_state,
    update_mixed_chunk,
)
from effkern.backends.triton.multi_tensor import addresses_of, bits_of, chunk_range, load_block
from effkern.backends.triton.rules import lamb_direction

_ROW = tl.constexpr(QUANTIZED_BLOCK)


@triton.jit
def advance_rows(
    begin,
    stop,
    addresses,
    source,
    scales,
    end,
    factor,
    advance,
    scalars,
    SCALED: tl.constexpr,
    STATES: tl.constexpr,
    STORAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Moves the states on from ``begin`` to ``stop``; gives the sums of squares of parameter and
    direction, in float64.
    """
    _, grad_address, address0, address1, _ = addresses
    scales0, scales1, _ = scales
    params = tl.zeros((ROWS, _ROW), tl.float32)
    directions = tl.zeros((ROWS, _ROW), tl.float32)
    for start in range(begin, stop, ROWS * _ROW):
        offsets = offsets_of(start, ROWS)
        param = load_block(source, offsets, end, STORAGE.param, tl.float32, WHOLE)
        grad = load_block(grad_address, offsets, end, DTYPE, tl.float32, WHOLE)
        if SCALED:
            grad = grad * factor
        states = load_states(addresses, scales, start, end, grad, STATES, STORAGE, ROWS, WHOLE)
        exp_avg, exp_avg_sq = advance(grad, states[0], states[1], scalars)
        exp_avg = store_state(address0, scales0, start, end, exp_avg, 0, STORAGE, ROWS, WHOLE)
        exp_avg_sq = store_state(address1, scales1, start, end, exp_avg_sq, 1, STORAGE, ROWS, WHOLE)
        direction = lamb_direction(param, exp_avg, exp_avg_sq, scalars)
        if not WHOLE:
            param = tl.where(offsets < end, param, 0.0)
            direction = tl.where(offsets < end, direction, 0.0)
        params += param * param
        directions += direction * direction
    return tl.sum(params.to(tl.float64)), tl.sum(directions.to(tl.float64))


@triton.jit
def mixed_first_pass(
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
    """Advances the states; the tensor's last program leaves lr * trust ratio in its row.

    workspace: float64 (chunks, 2). UPDATE: the rule's advance.
    """
    addresses = addresses_of(row, True, STATES)
    source = source_of(row, addresses[0], STORAGE)
    scales = scale_addresses(row, STATES, STORAGE)
    begin, whole_end, end = chunk_range(row, chunks, bits_of(addresses) | source, BLOCK)
    params, directions = advance_rows(
        begin, whole_end, addresses, source, scales, end, factor, UPDATE, scalars,
        SCALED, STATES, STORAGE, DTYPE, True, BLOCK // _ROW,
    )  # fmt: skip
    more_params, more_directions = advance_rows(
        whole_end, end, addresses, source, scales, end, factor, UPDATE, scalars,
        SCALED, STATES, STORAGE, DTYPE, False, BLOCK // 2 // _ROW,
    )  # fmt: skip
    put_step_size(
        row, chunks, workspace, lr, params + more_params, directions + more_directions, ACC
    )


@triton.jit
def mixed_second_pass(
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
    update_mixed_chunk(
        row, chunks, factor, t, UPDATE, both,
        False, False, STATES, 0, STORAGE, DTYPE, BLOCK,
    )  # fmt: skip
