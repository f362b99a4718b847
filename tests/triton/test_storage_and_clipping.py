"""Steps on states in other dtypes, with masters, on clipped gradients: bytes, launches, plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effkern.backends.table import TICKET
from effkern.ops.plan import put_gradients_
from effkern.optim.plan import Plan
from effkern.optim.storage import Storage
from tests.simt.variants import CHUNK, VARIANTS, Variant, blocks_of
from tests.support.rules import BY_NAME, random_tensors
from tests.support.stored import Stored, compare
from tests.triton.interpreter import Counts, counting
from tests.triton.planned import Planned

#: Tensors of one program each, and of none, one and two programs' worth of elements.
SHORT: list[Any] = [5, 0, 1027]
SIZES: list[Any] = [5, 0, 1024, CHUNK + 3]
PROGRAMS = sum(blocks_of(SIZES))
ELEMENTS = sum(SIZES)
#: A number in the table; a sum of squares.
NUMBER, SUM = 8, 8

STORED = {
    "float32, int8": (torch.float32, "int8", False, False),
    "float32, bfloat16": (torch.float32, torch.bfloat16, False, False),
    "bfloat16, int8, masters": (torch.bfloat16, "int8", True, False),
    "bfloat16, float32, stochastic": (torch.bfloat16, torch.float32, False, True),
    "float16, float32, masters": (torch.float16, torch.float32, True, False),
}
ADAM, LAMB = VARIANTS[0], VARIANTS[-1]
#: Every variant in two ways, Adam and LAMB in all, and on tensors of several programs.
CASES = [
    *((variant, way, SHORT) for variant in VARIANTS[1:-1] for way in list(STORED)[:3:2]),
    *((variant, way, SHORT) for variant in (ADAM, LAMB) for way in STORED),
    *((variant, "float32, int8", SIZES) for variant in (ADAM, LAMB)),
]
cases = pytest.mark.parametrize(
    ("variant", "way", "sizes"),
    [case for case in CASES if case[0].states or not case[1].startswith("float32")],
    ids=lambda x: str(len(x)) if isinstance(x, list) else str(x),
)


def make(variant: Variant, way: str, sizes: list[Any]) -> Stored:
    dtype, state, masters, keys = STORED[way]
    return Stored(
        variant.rule, sizes, dtype, "cpu", state, variant.options, masters=masters, keys=keys
    )


def least(variant: Variant, way: str, sizes: list[Any]) -> Counts:
    """The least that a step can move, counters on the CPU."""
    elements, programs = sum(sizes), sum(blocks_of(sizes))
    dtype, state, masters, keys = STORED[way]
    scales = sum(-(-size // 256) for size in sizes)
    quantized, item = state == "int8", dtype.itemsize
    state_item = 1 if quantized else state.itemsize
    states = elements * variant.states * state_item + quantized * scales * variant.states * 4
    param = elements * (4 if masters else item)
    # A program's numbers of the chunk, the tensor's length, and an address for each list.
    lists = 1 + masters + variant.states * (1 + quantized)
    program = 8 + NUMBER * (1 + lists + keys)
    read = param + elements * item + states + programs * (program + NUMBER)
    written = (param if masters else 0) + elements * item + states
    if variant.rule.name != "lamb":
        return Counts(1, read, written)
    # Beside what test_bytes_and_launches.py says of two launches: only the second rounds
    # parameters, and so reads keys.
    last = 4 + NUMBER
    read += programs * (2 * SUM + NUMBER - NUMBER * keys) + len(sizes) * last
    written += programs * 2 * SUM + len(sizes) * last
    read += param + states + programs * (program + 4)
    return Counts(2, read, written)


def overload(variant: Variant) -> Any:
    return getattr(torch.ops.effkern, f"_{variant.rule.name}_").triton


@cases
def test_steps_read_and_write_each_element_once(
    variant: Variant, way: str, sizes: list[Any]
) -> None:
    """Adam on int8 states and float32 parameters: 10 bytes read and 6 written an element, besides
    the scales; one launch.
    """
    stored = make(variant, way, sizes)
    with counting() as counts:
        stored.step(overload(variant))
    assert counts == least(variant, way, sizes)


def test_clipping_adds_the_numbers_alone() -> None:
    stored = make(ADAM, "float32, int8", SIZES)
    squares = torch.ones(3, dtype=torch.float64)
    with counting() as counts:
        stored.step(overload(ADAM), squares=squares, max_norm=1.0)
    plain = least(ADAM, "float32, int8", SIZES)
    assert counts == Counts(1, plain.read + PROGRAMS * 3 * SUM, plain.written)


@pytest.mark.parametrize("variant", [ADAM, VARIANTS[2], VARIANTS[8], LAMB], ids=str)
@pytest.mark.parametrize("way", STORED)
def test_a_plan_steps_as_lists_do(variant: Variant, way: str) -> None:
    """Bit for bit, and what random bits are made of is the number of each tensor's own step."""
    dtype, state, masters, keys = STORED[way]
    lists = make(variant, way, SHORT)
    for step in lists.steps[1:]:
        step += 4
    planned = lists.clone()
    lists.step(overload(variant))
    as_param = variant.states == 0 or state == dtype
    count = len(SHORT)
    scales, kept = [], 0
    for one in planned.states:
        here = bool(one) and state == "int8"
        scales.append(planned.scales[kept * count :][:count] if here else [])
        kept += here
    plan = Plan(
        planned.params,
        planned.states,
        planned.steps if planned.rule.counts or keys else [],
        Storage(state, as_param, masters, keys),
        scales,
        planned.masters,
        planned.keys,
        False,
    )
    put_gradients_(plan.table, plan.device_table, plan.layouts, planned.params, planned.grads)
    op = getattr(torch.ops.effkern, f"_{variant.rule.name}_planned_").triton
    op(*plan.arguments(), True, **planned.options)
    for name in ("params", "masters", "scales", "steps"):
        assert all(map(torch.equal, getattr(planned, name), getattr(lists, name))), name
    for one, other in zip(planned.states, lists.states, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("variant", [ADAM, LAMB], ids=str)
@pytest.mark.parametrize("state", ["int8", torch.bfloat16], ids=str)
def test_tensors_of_several_programs_against_the_reference(variant: Variant, state: Any) -> None:
    """Scales and random bits are those of the element's place in the whole tensor."""
    stored = Stored(
        variant.rule,
        [CHUNK + 700],
        torch.bfloat16,
        "cpu",
        state,
        variant.options,
        masters=True,
        keys=True,
    )
    right = stored.clone()
    stored.step(overload(variant))
    right.step(getattr(torch.ops.effkern, f"_{variant.rule.name}_").reference)
    compare(variant.rule, stored, right)
    assert (stored.params[0] == right.params[0])[CHUNK:].float().mean() > 0.95


# ---- sums of squares ----

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sum_of(grads: list[Tensor]) -> float:
    return sum(grad.double().square().sum().item() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares_are_summed_in_one_launch(dtype: torch.dtype) -> None:
    grads = random_tensors(BY_NAME["sgd"], SIZES, dtype).grads
    squares = torch.full((5,), -1.0, dtype=torch.float64)
    with counting() as counts:
        torch.ops.effkern._squares_.triton(squares, 3, grads)
    assert squares[[0, 1, 2, 4]].tolist() == [-1] * 4
    assert squares[3].item() == pytest.approx(sum_of(grads), rel=1e-14)
    # The chunk's two numbers, the tensor's length and the gradient's address; each program's sum,
    # there and back; a ticket of 0.
    read = ELEMENTS * dtype.itemsize + PROGRAMS * (8 + 2 * NUMBER + SUM)
    assert counts == Counts(1, read, PROGRAMS * SUM + SUM + NUMBER)


@pytest.mark.parametrize("sizes", [[], [0], [0, (3, 0)], [1], [8191], [CHUNK * 3]], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_squares_of_any_tensors(sizes: list[Any], offset: int) -> None:
    grads = random_tensors(BY_NAME["sgd"], sizes, offset=offset).grads
    squares = torch.full((2,), -1.0, dtype=torch.float64)
    torch.ops.effkern._squares_.triton(squares, 0, grads)
    assert squares.tolist() == [pytest.approx(sum_of(grads), rel=1e-14), -1.0]


def test_squares_of_huge_and_tiny_gradients() -> None:
    squares = torch.zeros(1, dtype=torch.float64)
    for value in (1e30, 1e-30):
        torch.ops.effkern._squares_.triton(squares, 0, [torch.full((7,), value)])
        assert squares.item() == pytest.approx(7 * value**2, rel=1e-6)
    for value in (torch.nan, torch.inf):
        torch.ops.effkern._squares_.triton(squares, 0, [torch.tensor([1.0, value])])
        assert not squares.isfinite().any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_clipped_step_by_plan(variant: Variant) -> None:
    """The sum of squares brings the plan's table up to date for the step after it."""
    sizes = SIZES if variant in (ADAM, LAMB) else SHORT
    tensors = random_tensors(variant.rule, sizes, torch.float64, steps=(2.0,))
    expected = tensors.clone()
    norm = sum_of(tensors.grads) ** 0.5
    squares = torch.zeros(1, dtype=torch.float64)
    planned = Planned(variant, tensors, on_device=False)
    by_hand = Planned(variant, expected, on_device=False)
    for max_norm in (norm / 2, 2 * norm)[: 1 if sizes is SHORT else 2]:
        factor = min(1.0, max_norm / (norm + 1e-6))
        tensors.grads = [grad.clone() for grad in tensors.grads]  # they have moved
        kept = expected.grads
        expected.grads = [grad * factor for grad in kept]
        planned.clipped_step(squares, max_norm)
        by_hand.step()
        expected.grads = kept
        assert squares.item() == pytest.approx(norm**2)
    assert not planned.plan.device_table[:, TICKET].any()
    for mine, right in zip(tensors.lists(), expected.lists(), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-14)


REFUSED = {
    "one dimension": (torch.zeros((), dtype=torch.float64), 0, "squares must be a"),
    "float64": (torch.zeros(2), 0, "squares must be a contiguous float64"),
    "contiguous": (torch.zeros(4, dtype=torch.float64)[::2], 0, "squares must be a contiguous"),
    "too far": (torch.zeros(2, dtype=torch.float64), 2, "place is 2"),
    "negative": (torch.zeros(2, dtype=torch.float64), -1, "place is -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_places_for_sums(case: str) -> None:
    squares, place, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.effkern._squares_.triton(squares, place, [torch.ones(3)])
    assert not squares.any()


def test_refused_gradients() -> None:
    squares = torch.zeros(1, dtype=torch.float64)
    for other in (torch.ones(3).double(), torch.ones(6)[::2], torch.ones(3).int()):
        with pytest.raises(RuntimeError, match=r"grads\[1\]"):
            torch.ops.effkern._squares_.triton(squares, 0, [torch.ones(3), other])
    assert squares.item() == 0
