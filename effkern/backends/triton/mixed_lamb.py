"""LAMB's two passes over tensors that are not all stored as the parameter is.

The first sums squares and writes no state, the second computes the new states again: what a state
loses in few bits is not lost to the direction. Both read gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effkern.backends.table import QUANTIZED_BLOCK
from effkern.backends.triton.lamb import put_step_size, step_size_of
from effkern.backends.triton.mixed import (
    load_states,
    mixed_pass,
    offsets_of,
    scale_addresses,
    source_of,
)
from effkern.backends.triton.multi_tensor import addresses_of, bits_of, chunk_range, load_block
from effkern.backends.triton.rules import lamb_direction

_ROW = tl.constexpr(QUANTIZED_BLOCK)


@triton.jit
def squares_of_rows(
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
    """The sums of squares of parameter and direction from ``begin`` to ``stop``, in float64."""
    params = tl.zeros((ROWS, _ROW), tl.float32)
    directions = tl.zeros((ROWS, _ROW), tl.float32)
    for start in range(begin, stop, ROWS * _ROW):
        offsets = offsets_of(start, ROWS)
        param = load_block(source, offsets, end, STORAGE.param, tl.float32, WHOLE)
        grad = load_block(addresses[1], offsets, end, DTYPE, tl.float32, WHOLE)
        if SCALED:
            grad = grad * factor
        exp_avg, exp_avg_sq, _ = load_states(
            addresses, scales, start, end, grad, STATES, STORAGE, ROWS, WHOLE
        )
        exp_avg, exp_avg_sq = advance(grad, exp_avg, exp_avg_sq, scalars)
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
    """Leaves lr * trust ratio in the row. workspace: float64 (chunks, 2). UPDATE: the advance."""
    addresses = addresses_of(row, True, STATES)
    source = source_of(row, addresses[0], STORAGE)
    scales = scale_addresses(row, STATES, STORAGE)
    begin, whole_end, end = chunk_range(row, chunks, bits_of(addresses) | source, BLOCK)
    params, directions = squares_of_rows(
        begin, whole_end, addresses, source, scales, end, factor, UPDATE, scalars,
        SCALED, STATES, STORAGE, DTYPE, True, BLOCK // _ROW,
    )  # fmt: skip
    more_params, more_directions = squares_of_rows(
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
    """Updates everything in this program's chunk."""
    both = (step_size_of(row, ACC), scalars)
    mixed_pass(
        row, chunks, workspace, lr, factor, t, both,
        UPDATE, SCALED, STATES, STORAGE, DTYPE, ACC, BLOCK,
    )  # fmt: skip
