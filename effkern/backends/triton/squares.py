"""The sum of squares of all gradients, in one launch, and what clipping makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.backends.table import DTYPES, GRAD
from effkern.backends.triton import multi_tensor
from effkern.backends.triton.checks import check_gradients, check_place, check_squares
from effkern.backends.triton.launch import COMPILER_OPTIONS, device_guard
from effkern.backends.triton.multi_tensor import (
    chunk_range,
    draws_last_ticket,
    load_block,
    table_row,
)
from effkern.backends.triton.numerics import TRITON_DTYPE, accumulation_dtype

_GRAD = tl.constexpr(GRAD)
_SUMMED = tl.constexpr(1024)


@triton.jit
def clipping_factor(squares, count, scale, max_norm):
    """csrc/math/clip.h: what gradients are multiplied by, float64; NaN stays NaN.

    squares: ``count`` numbers that add up to the sum of squares of all gradients as they are.
    scale: what those were multiplied by.
    """
    total = tl.full((), 0.0, tl.float64)
    for i in range(count):
        total += tl.load(squares + i)
    ratio = max_norm / (tl.sqrt(total) / scale + 1e-6)
    return tl.where(ratio >= 1.0, 1.0, ratio) / scale


@triton.jit
def squares_of_blocks(
    begin,
    stop,
    address,
    end,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares from ``begin`` to ``stop``, float64."""
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, stop, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = load_block(address, offsets, end, DTYPE, ACC, WHOLE).to(tl.float64)
        if not WHOLE:
            x = tl.where(offsets < end, x, 0.0)
        squares += x * x
    return tl.sum(squares, axis=0)


@triton.jit(do_not_specialize=["place"])
def squares_kernel(
    table,
    chunks,
    workspace,
    squares,
    place,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """squares[place] = the sum of squares of all gradients in the table, each read once.

    workspace: float64, one number for each program; the last program adds those up, in a fixed
    order.
    """
    row = table_row(table, chunks)
    grad = tl.load(row + _GRAD)
    begin, whole_end, end = chunk_range(row, chunks, grad, BLOCK)
    total = squares_of_blocks(begin, whole_end, grad, end, DTYPE, ACC, True, BLOCK)
    total += squares_of_blocks(whole_end, end, grad, end, DTYPE, ACC, False, BLOCK // 2)
    tl.store(workspace + tl.program_id(0), total)
    count = tl.num_programs(0)
    if draws_last_ticket(table, count):
        sums = tl.zeros((_SUMMED,), tl.float64)
        for start in range(0, count, _SUMMED):
            program = start + tl.arange(0, _SUMMED)
            sums += tl.load(workspace + program, mask=program < count, other=0.0)
        tl.store(squares + place, tl.sum(sums, axis=0))


def squares_(squares: Tensor, place: int, grads: Sequence[Tensor]) -> None:
    """``effkern::_squares_``: squares[place] = the sum of squares of all gradients.

    Args:
        squares: float64, one dimension, on the gradients' device.
        place: which of its numbers is written.
        grads: of one dtype and device, each dense in memory; may be empty.

    Raises:
        RuntimeError: naming the argument, what it was and what it must be; nothing was written.
    """
    with device_guard(squares, "_squares_"):
        check_place(squares, place)
        if not grads:
            squares[place].zero_()
            return
        check_gradients(grads)
        device = grads[0].device
        check_squares(squares, device)
        numels = [grad.numel() for grad in grads]
        table = multi_tensor.build_table(numels, {GRAD: grads})
        chunks = multi_tensor.build_chunks(numels)
        _sum(
            multi_tensor.to_device(table, device),
            multi_tensor.to_device(chunks, device),
            grads[0].dtype,
            squares,
            place,
        )


def squares_planned_(
    table: Tensor,
    device_table: Tensor,
    chunks: Tensor,
    layouts: Tensor,
    moved: bool,
    squares: Tensor,
    place: int,
) -> None:
    """``effkern::_squares_planned_``: the same with all addresses in place."""
    with device_guard(device_table, "_squares_planned_"):
        check_place(squares, place)
        check_squares(squares, device_table.device)
        multi_tensor.refresh(table, device_table, moved)
        if len(chunks):
            _sum(device_table, chunks, DTYPES[int(layouts[0])], squares, place)
        else:
            squares[place].zero_()


def _sum(table: Tensor, chunks: Tensor, dtype: torch.dtype, squares: Tensor, place: int) -> None:
    workspace = torch.empty(len(chunks), dtype=torch.float64, device=chunks.device)
    squares_kernel[(len(chunks),)](
        table,
        chunks,
        workspace,
        squares,
        place,
        DTYPE=TRITON_DTYPE[dtype],
        ACC=TRITON_DTYPE[accumulation_dtype(dtype)],
        # Two accesses a thread under way: there is but one tensor to read.
        BLOCK=2 * multi_tensor.block_size(dtype.itemsize),
        num_warps=multi_tensor.WARPS,
        **COMPILER_OPTIONS,
    )
