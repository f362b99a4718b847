"""Adam on every backend, from lists and from a plan: values against float64, sizes, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.adam import (
    OPTIONS,
    Tensors,
    by_lists,
    by_optimizer,
    by_torch,
    check_step,
    random_tensors,
)
from tests.support.backends import Backend

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
both_ways = pytest.mark.parametrize("step", [by_lists, by_optimizer])

#: No elements, one, a few; around the vectors of 4 to 32 lanes.
SIZES: list[int | tuple[int, ...]] = [0, (), 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, (3, 5), 65]
FEW: list[int | tuple[int, ...]] = [5, (), 0, 33]


@both_ways
@dtypes
def test_sizes_and_dtypes(backend: Backend, dtype: torch.dtype, step: Any) -> None:
    tensors = random_tensors(SIZES, dtype, backend.device)
    for _ in range(1 if backend.slow else 3):
        check_step(tensors, step)


@both_ways
@dtypes
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("decoupled", "weight_decay"), [(False, 0.0), (False, 0.3), (True, 0.3)])
def test_every_branch_of_the_formula(
    backend: Backend,
    dtype: torch.dtype,
    step: Any,
    decoupled: bool,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """The first step and a later one; with AMSGrad the larger value is now the old, now the new."""
    tensors = random_tensors([37], dtype, backend.device, steps=(3.0,))
    old, new = tensors.max_exp_avg_sqs[0], tensors.exp_avg_sqs[0]
    assert (old > 2 * new).any()
    assert (old < 0.5 * new).any()
    kinds = {
        "decoupled": decoupled,
        "weight_decay": weight_decay,
        "amsgrad": amsgrad,
        "maximize": maximize,
    }
    check_step(tensors, step, **kinds)
    check_step(random_tensors([37], dtype, backend.device), step, **kinds)


@pytest.mark.parametrize(
    "options",
    [
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"beta1": 0.3, "beta2": 0.999},
        {"lr": 0.0},
        {"lr": 3.0, "decoupled": True},
        {"eps": 0.0},
    ],
    ids=str,
)
def test_limits_of_the_options(backend: Backend, options: dict[str, Any]) -> None:
    check_step(random_tensors([19], device=backend.device), **options)


@both_ways
@pytest.mark.parametrize("steps", [(1e6,), (16777214.0,), (0.0, 7.0, 1.0, 7.0, 250.0)], ids=str)
def test_step_counts(backend: Backend, step: Any, steps: tuple[float, ...]) -> None:
    """Many steps, and another number of them for each parameter."""
    check_step(random_tensors([9, 3, 17, 0, 4], device=backend.device, steps=steps), step)


@both_ways
def test_float64_step_counters(backend: Backend, step: Any) -> None:
    tensors = random_tensors([9, 33], device=backend.device, step_dtype=torch.float64)
    check_step(tensors, step)
    assert {t.dtype for t in tensors.steps} == {torch.float64}


@both_ways
@dtypes
@pytest.mark.parametrize("offset", [1, 2, 5])
def test_unaligned_storage(backend: Backend, dtype: torch.dtype, step: Any, offset: int) -> None:
    sizes = [1, 33, 70] if backend.slow else [1, 33, 200, 8193]
    check_step(random_tensors(sizes, dtype, backend.device, offset=offset), step)


@both_ways
@pytest.mark.parametrize("numel", [8191, 8192, 8193, 24577])
def test_sizes_around_a_block_of_gpu_work(backend: Backend, step: Any, numel: int) -> None:
    if backend.slow and numel > 8193:
        numel = 16385
    check_step(random_tensors([numel], device=backend.device), step)


@both_ways
@pytest.mark.parametrize("place", range(4))
def test_an_empty_tensor_at_every_place(backend: Backend, step: Any, place: int) -> None:
    sizes: list[int | tuple[int, ...]] = [5, (2, 3), 40]
    sizes.insert(place, (4, 0, 3))
    check_step(random_tensors(sizes, device=backend.device), step)


@both_ways
def test_nothing_but_empty_tensors(backend: Backend, step: Any) -> None:
    check_step(random_tensors([0, (3, 0)], device=backend.device), step)


def test_an_infinite_parameter_is_not_decayed_into_nan(backend: Backend) -> None:
    """0 * inf is NaN: a decay of 0 must not be multiplied."""
    for decoupled in (False, True):
        tensors = random_tensors([9], device=backend.device)
        tensors.params[0][2] = float("inf")
        check_step(tensors, weight_decay=0.0, decoupled=decoupled)
        assert tensors.params[0][2].item() == float("inf")


@pytest.mark.parametrize("amsgrad", [False, True])
@dtypes
def test_nan_and_infinity_go_where_they_go_in_torch(
    backend: Backend, dtype: torch.dtype, amsgrad: bool
) -> None:
    tensors = random_tensors([40], dtype, backend.device)
    for place, value in ((1, "nan"), (17, "inf"), (33, "-inf")):
        tensors.grads[0][place] = float(value)
    eager = tensors.clone()
    options = {**OPTIONS, "amsgrad": amsgrad}
    for _ in range(2):
        by_lists(tensors, options)
        by_torch(eager, options)
    for mine, theirs in zip(tensors.lists(), eager.lists(), strict=True):
        mine, theirs = mine[0].cpu(), theirs[0]
        assert torch.equal(mine.isnan(), theirs.isnan())
        infinite = theirs.isinf()
        assert torch.equal(mine[infinite], theirs[infinite])


@pytest.mark.parametrize("threads", [1, 2, 5])
@dtypes
def test_the_number_of_threads_changes_no_bit(
    backend: Backend, dtype: torch.dtype, threads: int
) -> None:
    if backend.slow:
        pytest.skip("one thread interprets the kernels")
    tensors = random_tensors([70000, 5, 70001], dtype, backend.device, offset=1)
    other = Tensors(*([t.clone() for t in one] for one in tensors.lists()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        by_lists(tensors, OPTIONS)
        torch.set_num_threads(2)
        by_lists(other, OPTIONS)
    finally:
        torch.set_num_threads(before)
    for mine, theirs in zip(tensors.lists(), other.lists(), strict=True):
        assert all(map(torch.equal, mine, theirs))


@both_ways
@dtypes
def test_the_other_tensors_change_no_bit(backend: Backend, dtype: torch.dtype, step: Any) -> None:
    together = random_tensors([33, 300, 7, 0, 33], dtype, backend.device, steps=(0.0, 4.0))
    apart = Tensors(*([t.clone() for t in one] for one in together.lists()))
    step(together, OPTIONS)
    for i in range(len(apart.params)):
        step(apart.alone(i), OPTIONS)
    for mine, theirs in zip(together.lists(), apart.lists(), strict=True):
        assert all(map(torch.equal, mine, theirs))


@dtypes
def test_an_elements_place_changes_no_bit(backend: Backend, dtype: torch.dtype) -> None:
    """The same numbers in whole vectors and in the tail."""
    if backend.name == "reference":
        pytest.skip("PyTorch's own vectorised loops differ from their tails in the last digit")
    whole = random_tensors([64], dtype, backend.device)
    parts = [
        Tensors(*([t[i:j].clone() for t in one] for one in whole.lists()[:5]), [torch.tensor(0.0)])
        for i, j in ((0, 1), (1, 4), (4, 11), (11, 64))
    ]
    by_lists(whole, OPTIONS)
    for part in parts:
        by_lists(part, OPTIONS)
    for k, one in enumerate(whole.lists()[:5]):
        assert torch.equal(one[0], torch.cat([part.lists()[k][0] for part in parts]))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_opcheck(backend: Backend, amsgrad: bool) -> None:
    if backend.slow:
        pytest.skip("one schema for all: interpreting the kernels adds nothing")
    tensors = random_tensors([3, (2, 4)], device=backend.device)
    lists = tensors.lists() if amsgrad else (*tensors.lists()[:4], [], tensors.steps)
    overload = "reference" if backend.name == "reference" else "default"
    op = getattr(torch.ops.effkern._adam_, overload)
    torch.library.opcheck(op, lists, {**OPTIONS, "amsgrad": amsgrad})


def test_version_counters_rise(backend: Backend) -> None:
    if backend.name == "simt":
        pytest.skip("an overload for tests alone")
    tensors = random_tensors([3, 5], device=backend.device)
    before = [[t._version for t in one] for one in tensors.lists()]
    by_lists(tensors, {**OPTIONS, "amsgrad": True})
    params, grads, *states = ([t._version for t in one] for one in tensors.lists())
    assert grads == before.pop(1)
    for now, then in zip((params, *states), before, strict=True):
        assert all(map(int.__gt__, now, then))
