"""Each input byte is read once and each output byte written once, in the fewest launches."""

from __future__ import annotations

from math import ceil

import pytest
import torch

from effkern.backends.triton.norm_kernels import (
    BACKWARD_ROW_BYTES,
    FORWARD_ROW_BYTES,
    ORIGIN_FEATURES,
    tile_for,
)
from tests.simt.variants import CHUNK, VARIANTS, Variant, blocks_of
from tests.support.norms import LAYER, Norm, every_norm
from tests.support.rules import random_tensors
from tests.triton.interpreter import Counts, counting
from tests.triton.planned import Planned

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)

#: Tensors of none, one and two programs' worth of elements.
SIZES = [5, 0, 1024, CHUNK + 3]
PROGRAMS = sum(blocks_of(SIZES))
#: A number in the table, a pair of float64.
NUMBER, PAIR = 8, 16


def taken(variant: Variant, dtype: torch.dtype = torch.float32, **keywords: object) -> Counts:
    """What a step moves, with counters on the CPU."""
    return _step(variant, dtype, False, (3.0,), **keywords)


def taken_on_device(variant: Variant, step_dtype: torch.dtype, **keywords: object) -> Counts:
    """The same with counters on the device."""
    return _step(variant, torch.float32, True, (3.0,), step_dtype, **keywords)


def _step(
    variant: Variant,
    dtype: torch.dtype,
    on_device: bool,
    steps: tuple[float, ...],
    step_dtype: torch.dtype = torch.float32,
    **keywords: object,
) -> Counts:
    tensors = random_tensors(variant.rule, SIZES, dtype, steps=steps, step_dtype=step_dtype)
    planned = Planned(variant, tensors, on_device=on_device)
    with counting() as counts:
        planned.step(**keywords)
    return counts


def least(variant: Variant, dtype: torch.dtype) -> Counts:
    """The least that a step of tensors of `SIZES` can move, counters on the CPU.

    A program reads its two numbers of the chunk, the tensor's length and an address for each list.
    """
    elements, states = sum(SIZES) * dtype.itemsize, variant.states
    program = 8 + NUMBER * (1 + 2 + states)
    read, written = elements * (2 + states) + PROGRAMS * program, elements * (1 + states)
    if variant.rule.name != "lamb":
        return Counts(1, read, written)
    # The first launch leaves the parameter as it is. Its programs write two sums and read the
    # tensor's length again; the last one of each tensor finds its neighbours' sums, adds them up
    # and leaves one number, and a ticket of 0.
    last = 4 + NUMBER
    read += PROGRAMS * (PAIR + NUMBER) + len(SIZES) * last
    written += PROGRAMS * PAIR + len(SIZES) * (4 + NUMBER)
    # The second reads all but the gradient, and that number.
    read += elements * (1 + states) + PROGRAMS * (program - NUMBER + 4)
    return Counts(2, read, written)


@dtypes
@variants
def test_steps_read_and_write_each_element_once(variant: Variant, dtype: torch.dtype) -> None:
    """AdamW in float32: 16 bytes read and 12 written an element, and one launch."""
    assert taken(variant, dtype) == least(variant, dtype)


@variants
def test_parameters_that_joined_late(variant: Variant) -> None:
    """No further launch; each program reads its tensor's two numbers where the rule has any."""
    expected = least(variant, torch.float32)
    if variant.reads_steps:
        expected.read += expected.launches * PROGRAMS * (4 + PAIR)
    assert _step(variant, torch.float32, False, (9.0, 0.0)) == expected


@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64], ids=str)
@variants
def test_counters_on_the_device_add_their_own_bytes(
    variant: Variant, step_dtype: torch.dtype
) -> None:
    expected = least(variant, torch.float32)
    # The counter and its address; where it is increased, each program reads the tensor's length
    # again, and the last one of each tensor the address, to write the counter and a ticket of 0.
    expected.read += expected.launches * PROGRAMS * (NUMBER + step_dtype.itemsize)
    expected.read += PROGRAMS * NUMBER + len(SIZES) * NUMBER
    expected.written += len(SIZES) * (NUMBER + step_dtype.itemsize)
    assert taken_on_device(variant, step_dtype) == expected


@variants
def test_numbers_on_the_device_are_read_once_a_program(variant: Variant) -> None:
    plain = taken_on_device(variant, torch.float32)
    for name, value, launches in (
        ("lr_tensor", 0.1, plain.launches),
        ("found_inf", 0.0, plain.launches),
        ("grad_scale", 8.0, 1),  # LAMB's second launch reads no gradients
    ):
        number = torch.tensor(value, dtype=torch.float64)
        counts = taken_on_device(variant, torch.float32, **{name: number})
        read = launches * PROGRAMS * number.itemsize
        assert counts == Counts(plain.launches, plain.read + read, plain.written)


@variants
def test_nothing_moves_where_an_infinity_was_found(variant: Variant) -> None:
    found = torch.tensor(1.0)
    counts = taken_on_device(variant, torch.float32, found_inf=found)
    assert counts == Counts(counts.launches, counts.launches * PROGRAMS * found.itemsize, 0)


# Rows that fit, and one that is just too long for float32.
FORWARD_SHAPES = [(40, 96), (3, 16384), (2, 16385)]
BACKWARD_SHAPES = [(40, 96), (9, 8192), (9, 8193)]


@dtypes
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", FORWARD_SHAPES, ids=str)
@every_norm
def test_the_forward_pass_of_norms(
    norm: Norm, dtype: torch.dtype, residual: bool, shape: tuple[int, int]
) -> None:
    rows, features = shape
    x = torch.rand(shape).to(dtype)
    forward = norm.op("add_forward" if residual else "forward", "triton")
    tensors = [x, x] if residual else [x]
    with counting() as counts:
        forward(*tensors, *norm.random_parameters((features,)), 1, 1e-6)
    tile = tile_for(features, torch.float32, FORWARD_ROW_BYTES)
    tensor = rows * features * dtype.itemsize
    parameters = norm.parameters * ceil(rows / tile.rows) * features * 4
    reads = len(tensors) + (tile.columns > 1)  # a long row's second read
    origin = 0
    if tile.columns > 1 and norm is LAYER:
        origin = len(tensors) * rows * ORIGIN_FEATURES.value * dtype.itemsize
    written = len(tensors) * tensor + norm.numbers * rows * 4
    assert counts == Counts(1, reads * tensor + parameters + origin, written)


@dtypes
@pytest.mark.parametrize("wants_weight", [False, True], ids=["x", "x and parameters"])
@pytest.mark.parametrize("shape", BACKWARD_SHAPES, ids=str)
@every_norm
def test_the_backward_pass_of_norms(
    norm: Norm, dtype: torch.dtype, wants_weight: bool, shape: tuple[int, int]
) -> None:
    rows, features = shape
    x, weight = torch.rand(shape).to(dtype), torch.rand(features)
    kept = torch.rand(norm.numbers, rows)
    wants, sums = [wants_weight] * norm.parameters, norm.parameters
    with counting() as counts:
        norm.op("backward", "triton")(x, x, x, weight, kept, 1, True, *wants)
    tile = tile_for(features, torch.float32, BACKWARD_ROW_BYTES)
    stretches = ceil(rows / max(8, tile.rows))
    tensor, row, number = rows * features * dtype.itemsize, features * 4, rows * 4
    numbers, means = norm.numbers * number, (2 if norm is LAYER else 1) * number

    expected = Counts(1, 3 * tensor + stretches * row + numbers, tensor)
    if tile.columns > 1:
        # First what each row's means need; then, for each block of columns, those beside what is
        # kept of the row.
        expected.launches += 1
        expected.read += 2 * tensor + rows * row
        expected.read += tile.columns * (numbers + means)
        expected.written += means
    if wants_weight:
        expected.launches += 1
        expected.read += sums * stretches * row
        expected.written += sums * (stretches * row + row)
    assert counts == expected
