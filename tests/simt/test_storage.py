"""Steps whose tensors have other dtypes than their parameters: every kernel from any address, bit
for bit where that can be known, and the bytes it moves.
"""

from __future__ import annotations

import pytest
import torch

from effkern.backends.reference.rounding import stochastically_rounded
from effkern.backends.table import TICKET
from tests.simt import build
from tests.simt.stored import CASES, WAYS, Way, overload, planned
from tests.simt.variants import CHUNK, VARIANTS, Variant, at_offset, blocks_of
from tests.support.stored import Stored, compare

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler")

cases = pytest.mark.parametrize(("variant", "way"), CASES, ids=str)
LAMB = VARIANTS[-1]

#: Part of a block of 256, one, more; nothing; more than a block of GPU work.
SIZES = [5, 0, 256, 300, CHUNK + 600]
BLOCKS = sum(blocks_of(SIZES))


def assert_equal(mine: Stored, other: Stored) -> None:
    for name in ("params", "masters", "scales", "steps"):
        assert all(map(torch.equal, getattr(mine, name), getattr(other, name))), name
    for a, b in zip(mine.states, other.states, strict=True):
        assert all(map(torch.equal, a, b))


@cases
def test_steps_agree_with_the_reference(variant: Variant, way: Way) -> None:
    build.load()
    mine = way.make(variant, SIZES, steps=(0.0, 3.0))
    right = mine.clone()
    mine.step(overload(variant))
    right.step(overload(variant, "reference"))
    compare(variant.rule, mine, right)
    for i, (master, param) in enumerate(zip(mine.masters, mine.params, strict=False)):
        t = mine.steps[i].item() if variant.rule.counts or way.keys else 1.0
        rounded = (
            stochastically_rounded(master, mine.keys[i], t) if way.keys else master.to(way.dtype)
        )
        assert torch.equal(param, rounded)


@cases
def test_any_address_will_do(variant: Variant, way: Way) -> None:
    """And changes no bit, whichever list is off."""
    build.load()
    aligned = way.make(variant, [300, 256])
    made = aligned.clone()
    aligned.step(overload(variant))
    lists = [name for name in ("params", "grads", "masters") if getattr(made, name)]
    for name in [*lists, *range(len(made.states))]:
        mine = made.clone()
        values = mine.states if isinstance(name, int) else mine.__dict__
        values[name] = [at_offset(tensor, 1) for tensor in values[name]]  # type: ignore[index]
        mine.step(overload(variant))
        assert_equal(mine, aligned)


@cases
def test_plans_and_counters_on_the_device(variant: Variant, way: Way) -> None:
    """Bit for bit as lists, in any order of blocks; a tensor's own step makes its random bits."""
    simt = build.load()
    lists = way.make(variant, SIZES[2:], steps=(0.0, 4.0, 7.0))
    lists_step = overload(variant)
    others = [lists.clone(), lists.clone()]
    plans = [
        planned(variant, way, stored, on_device=on_device)
        for stored, on_device in zip(others, (False, True), strict=True)
    ]
    for seed in range(2):
        simt.seed(seed)
        lists_step(
            lists.params,
            lists.grads,
            *lists.states,
            lists.steps,
            lists.masters,
            lists.scales,
            lists.keys,
            **lists.options,
        )
        for (plan, step), stored in zip(plans, others, strict=True):
            step()
            assert_equal(stored, lists)
            assert not plan.device_table[:, TICKET].any()
    before = others[1].clone()
    plans[1][1](found_inf=torch.tensor(1.0))
    assert_equal(others[1], before)


def least(variant: Variant, way: Way) -> tuple[int, int, int]:
    """Launches of a step of tensors of `SIZES`, and the bytes that they must read and write,
    counters on the CPU.
    """
    elements, item = sum(SIZES), way.dtype.itemsize
    blocks_of_256 = sum(-(-size // 256) for size in SIZES)
    if way.quantized:
        states = variant.states * (elements + 4 * blocks_of_256)
    else:
        states = variant.states * elements * way.state.itemsize  # type: ignore[union-attr]
    source = elements * (4 if way.masters else item)
    # A block's chunk row; of the table the number of elements, an address for each list, that of
    # the gradients apart, the number of the step, and the key.
    lists = 1 + way.masters + variant.states * (1 + way.quantized)
    last = BLOCKS * (8 + 8 * (1 + lists + (variant.reads_steps or way.keys) + way.keys))
    written = elements * item + (source if way.masters else 0)
    if variant.rule.name != "lamb":
        read = source + elements * item + states + last + BLOCKS * 8
        return 1, read, states + written
    # The first launch reads no keys, writes the states and two float64 sums a block, which the
    # tensor's last block reads; the second reads the number that this leaves.
    tickets = 4 * sum(blocks for blocks in blocks_of(SIZES) if blocks > 1)
    first = last + BLOCKS * (8 - 8 * way.keys) + BLOCKS * 16 + tickets
    read = source + elements * item + states + first + source + states + last + BLOCKS * 4
    return 2, read, states + BLOCKS * 16 + tickets + 4 * len(SIZES) + written


@cases
def test_each_element_is_read_and_written_once(variant: Variant, way: Way) -> None:
    """Adam on float32 with states of 8 bits: 10 bytes read and 6 written an element."""
    simt = build.load()
    stored = way.make(variant, SIZES)
    _, step = planned(variant, way, stored, on_device=False)
    step()
    simt.reset()
    step()
    seen = simt.counts()
    assert (seen.launches, seen.read, seen.written) == least(variant, way)
    assert seen.uploaded == 0


@pytest.mark.parametrize("way", [WAYS[0], WAYS[4]], ids=str)
def test_the_order_of_threads_and_blocks_does_not_change_lamb(way: Way) -> None:
    simt = build.load()
    made = way.make(LAMB, [3 * CHUNK + 3, 700])
    results = []
    for seed in range(3):
        simt.seed(seed)
        results.append(made.clone())
        results[-1].step(overload(LAMB))
    for other in results[1:]:
        assert_equal(other, results[0])


def test_a_block_of_zeros_stays_zero() -> None:
    build.load()
    way, adam = WAYS[0], VARIANTS[0]
    stored = way.make(adam, [600])
    states = [codes for one in stored.states for codes in one]
    for tensor in (*stored.grads, *stored.scales, *states):
        tensor[: 300 if tensor.numel() > 3 else 1].zero_()
    stored.options["weight_decay"] = 0.0
    before = stored.clone()
    stored.step(overload(adam))
    assert torch.equal(stored.params[0][:256], before.params[0][:256])
    for one, scales in zip(stored.states[:2], stored.scales, strict=True):
        assert not one[0][:256].any()
        assert scales[0] == 0
        assert scales[1] > 0


def test_a_small_square_does_not_become_zero() -> None:
    build.load()
    way, adam = WAYS[0], VARIANTS[0]
    stored = way.make(adam, [256])
    stored.scales[1].fill_(1e-12)
    stored.grads[0].fill_(1e-5)
    stored.grads[0][0] = 1.0
    stored.options["weight_decay"] = 0.0
    stored.step(overload(adam))
    codes = stored.states[1][0]
    assert codes[0] == 255
    assert (codes[1:] == 1).all()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "eps" in v.options], ids=str)
def test_what_lies_behind_the_end_does_not_count(variant: Variant) -> None:
    """With eps 0 a formula makes NaN of the zeros there."""
    build.load()
    stored = WAYS[0].make(variant, [5])
    stored.options["eps"] = 0.0
    stored.step(overload(variant))
    assert all(scales.isfinite().all() for scales in stored.scales)
    assert stored.params[0].isfinite().all()
