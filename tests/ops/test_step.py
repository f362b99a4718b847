"""Every update rule on every backend, from lists and from a plan: values against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.backends import Backend
from tests.support.rules import BY_NAME, RULES, Rule, Tensors, check_step, random_tensors

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
both_ways = pytest.mark.parametrize("step", ["by_lists", "by_optimizer"])

#: No elements, one, a few; around the vectors of 4 to 32 lanes.
SIZES: list[int | tuple[int, ...]] = [0, (), 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, (3, 5), 65]


def copies(tensors: Tensors) -> Tensors:
    """The same numbers, at aligned addresses."""
    return Tensors.of([[t.clone() for t in one] for one in tensors.lists()])


def assert_equal(mine: Tensors, theirs: Tensors) -> None:
    for a, b in zip(mine.lists(), theirs.lists(), strict=True):
        assert all(map(torch.equal, a, b))


@rules
@both_ways
@dtypes
def test_sizes_and_dtypes(backend: Backend, rule: Rule, dtype: torch.dtype, step: str) -> None:
    sizes = [0, (), 3, 33] if backend.slow else SIZES
    tensors = random_tensors(rule, sizes, dtype, backend.device)
    for _ in range(1 if backend.slow else 3):
        check_step(rule, tensors, step)


@rules
@dtypes
@pytest.mark.parametrize("steps", [0.0, 3.0])
def test_every_branch_of_the_formula(
    backend: Backend, rule: Rule, dtype: torch.dtype, steps: float
) -> None:
    """The first step and a later one."""
    if backend.slow and dtype is torch.float16:
        pytest.skip("bfloat16 takes the same way")
    for changed in rule.branches:
        tensors = random_tensors(rule, [37], dtype, backend.device, steps=(steps,))
        check_step(rule, tensors, **changed)
        check_step(rule, tensors, "by_optimizer", **changed)


LIMITS = {
    "adam": [{"beta1": 0.0}, {"beta2": 0.0}, {"beta1": 0.3, "beta2": 0.999}, {"eps": 0.0}],
    "sgd": [{"momentum": 1.0}, {"dampening": 1.0}],
    "adagrad": [{"eps": 0.0}, {"lr_decay": 10.0}],
    "rmsprop": [{"alpha": 0.0}, {"alpha": 1.0}, {"eps": 0.0, "centered": False}],
    "adadelta": [{"rho": 0.0}, {"rho": 1.0}],
    "lion": [{"beta1": 0.0}, {"beta2": 0.0}],
    "lamb": [{"beta1": 0.0}, {"beta2": 0.0}, {"eps": 0.0}],
}


@pytest.mark.parametrize(
    ("rule", "changed"),
    [(rule, c) for rule in RULES for c in (*LIMITS[rule.name], {"lr": 0.0}, {"lr": 3.0})],
    ids=lambda x: getattr(x, "name", None) or str(x),
)
def test_limits_of_the_options(backend: Backend, rule: Rule, changed: dict[str, Any]) -> None:
    if rule.name == "rmsprop" and changed == {"alpha": 0.0}:
        changed = {**changed, "centered": False}  # a variance of one value is 0
    check_step(rule, random_tensors(rule, [19], device=backend.device), **changed)


@pytest.mark.parametrize("rule", [r for r in RULES if r.counts is True], ids=lambda r: r.name)
@both_ways
@pytest.mark.parametrize("steps", [(1e6,), (16777214.0,), (0.0, 7.0, 1.0, 7.0, 250.0)], ids=str)
def test_step_counts(backend: Backend, rule: Rule, step: str, steps: tuple[float, ...]) -> None:
    """Many steps, and another number of them for each parameter."""
    check_step(
        rule, random_tensors(rule, [9, 3, 17, 0, 4], device=backend.device, steps=steps), step
    )


def test_a_new_momentum_buffer_beside_old_ones(backend: Backend) -> None:
    rule = BY_NAME["sgd"]
    for step in ("by_lists", "by_optimizer"):
        tensors = random_tensors(rule, [9, 33, 4], device=backend.device, steps=(1.0, 0.0))
        check_step(rule, tensors, step)
        check_step(rule, tensors, step)


@pytest.mark.parametrize("rule", [r for r in RULES if r.counts is True], ids=lambda r: r.name)
@both_ways
def test_float64_step_counters(backend: Backend, rule: Rule, step: str) -> None:
    tensors = random_tensors(rule, [9, 33], device=backend.device, step_dtype=torch.float64)
    check_step(rule, tensors, step)
    assert {t.dtype for t in tensors.steps} == {torch.float64}


@rules
@both_ways
@dtypes
@pytest.mark.parametrize("offset", [1, 2, 5])
def test_unaligned_storage(
    backend: Backend, rule: Rule, dtype: torch.dtype, step: str, offset: int
) -> None:
    if backend.slow and (offset != 1 or dtype in (torch.float64, torch.float16)):
        pytest.skip("one of each path is enough where kernels are interpreted")
    # Of several elements: where eager PyTorch is exact by chance, two roundings are too many.
    sizes = [5, 33] if backend.slow else [5, 33, 200, 8193]
    check_step(rule, random_tensors(rule, sizes, dtype, backend.device, offset=offset), step)


@rules
@pytest.mark.parametrize("numel", [8191, 8192, 8193, 24577])
def test_sizes_around_a_block_of_gpu_work(backend: Backend, rule: Rule, numel: int) -> None:
    if backend.slow and numel == 24577:
        numel = 16385
    check_step(rule, random_tensors(rule, [numel], device=backend.device))


@rules
@both_ways
@pytest.mark.parametrize("place", range(4))
def test_an_empty_tensor_at_every_place(
    backend: Backend, rule: Rule, step: str, place: int
) -> None:
    sizes: list[int | tuple[int, ...]] = [5, (2, 3), 40]
    sizes.insert(place, (4, 0, 3))
    check_step(rule, random_tensors(rule, sizes, device=backend.device), step)


@rules
@both_ways
def test_nothing_but_empty_tensors(backend: Backend, rule: Rule, step: str) -> None:
    check_step(rule, random_tensors(rule, [0, (3, 0)], device=backend.device), step)


@rules
def test_an_infinite_parameter_is_not_decayed_into_nan(backend: Backend, rule: Rule) -> None:
    """0 * inf is NaN: a decay of 0 must not be multiplied."""
    if rule.name == "lamb":
        pytest.skip("an infinite norm makes an infinite ratio")
    tensors = random_tensors(rule, [9], device=backend.device)
    tensors.params[0][2] = float("inf")
    check_step(rule, tensors, weight_decay=0.0)
    assert tensors.params[0][2].item() == float("inf")


@rules
@dtypes
def test_nan_and_infinity_go_where_they_go_in_torch(
    backend: Backend, rule: Rule, dtype: torch.dtype
) -> None:
    for changed in rule.branches:
        if changed.get("nesterov") or (rule.options.get("centered") and not changed):
            continue  # inf - inf
        tensors = random_tensors(rule, [40], dtype, backend.device, steps=(1.0,))
        for place, value in ((1, "nan"), (17, "inf"), (33, "-inf")):
            tensors.grads[0][place] = float(value)
        eager = tensors.clone()
        options = {**rule.options, **changed}
        for _ in range(2):
            rule.by_lists(tensors, options)
            rule.by_torch(eager, options)
        for keep, mine, theirs in zip(
            [True, *rule.kept(options)],
            [tensors.params, *tensors.states],
            [eager.params, *eager.states],
            strict=True,
        ):
            if keep:
                a, b = mine[0].cpu(), theirs[0]
                assert torch.equal(a.isnan(), b.isnan())
                assert torch.equal(a[b.isinf()], b[b.isinf()])


@rules
@pytest.mark.parametrize("threads", [1, 2, 5])
@dtypes
def test_the_number_of_threads_changes_no_bit(
    backend: Backend, rule: Rule, dtype: torch.dtype, threads: int
) -> None:
    if backend.slow:
        pytest.skip("one thread interprets the kernels")
    tensors, other = (
        random_tensors(rule, [70000, 5, 70001], dtype, backend.device, offset=1) for _ in range(2)
    )
    for one, same in zip(tensors.lists(), other.lists(), strict=True):
        torch._foreach_copy_(same, one)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        rule.by_lists(tensors, rule.options)
        torch.set_num_threads(2)
        rule.by_lists(other, rule.options)
    finally:
        torch.set_num_threads(before)
    assert_equal(tensors, other)


@pytest.mark.parametrize("rule", [r for r in RULES if r.name != "lamb"], ids=lambda r: r.name)
@dtypes
def test_where_memory_begins_changes_no_bit(
    backend: Backend, rule: Rule, dtype: torch.dtype
) -> None:
    """LAMB's norms are sums, which the GPU kernels take in the order of their accesses."""
    if backend.name == "reference":
        pytest.skip("PyTorch's own vectorised loops differ from their tails in the last digit")
    numel = 2100 if backend.slow else 70001
    tensors = random_tensors(rule, [numel], dtype, backend.device, offset=1)
    other = copies(tensors)
    rule.by_lists(tensors, rule.options)
    rule.by_lists(other, rule.options)
    assert_equal(tensors, other)


@rules
@both_ways
@dtypes
def test_the_other_tensors_change_no_bit(
    backend: Backend, rule: Rule, dtype: torch.dtype, step: str
) -> None:
    sizes = [33, 7, 0] if backend.slow else [33, 300, 7, 0, 33]
    together = random_tensors(rule, sizes, dtype, backend.device, steps=(0.0, 4.0))
    apart = copies(together)
    getattr(rule, step)(together, rule.options)
    for i in range(len(apart.params)):
        alone = apart.alone(i)
        getattr(rule, step)(alone, rule.options)
        for one, new in zip(apart.lists(), alone.lists(), strict=True):
            one[i] = new[0]
    assert_equal(together, apart)


@pytest.mark.parametrize("rule", [r for r in RULES if r.name != "lamb"], ids=lambda r: r.name)
@dtypes
def test_an_elements_place_changes_no_bit(backend: Backend, rule: Rule, dtype: torch.dtype) -> None:
    """The same numbers in whole vectors and in the tail."""
    if backend.name == "reference":
        pytest.skip("PyTorch's own vectorised loops differ from their tails in the last digit")
    whole = random_tensors(rule, [64], dtype, backend.device)
    bounds = ((0, 1), (1, 4), (4, 11), (11, 64))
    parts = [
        Tensors.of(
            [
                *([t[i:j].clone() for t in one] for one in whole.lists()[:-1]),
                [torch.tensor(0.0)],
            ]
        )
        for i, j in bounds
    ]
    rule.by_lists(whole, rule.options)
    for part in parts:
        rule.by_lists(part, rule.options)
    for k, one in enumerate(whole.lists()[:-1]):
        assert torch.equal(one[0], torch.cat([part.lists()[k][0] for part in parts]))


@pytest.mark.parametrize("numel", [100, 20000])
def test_lambs_ratio_is_one_where_a_norm_is_zero(backend: Backend, numel: int) -> None:
    rule = BY_NAME["lamb"]
    if backend.slow:
        numel = min(numel, 8200)
    for zero in ("params", "direction"):
        tensors = random_tensors(rule, [numel, 3], device=backend.device)
        if zero == "params":
            tensors.params[0].zero_()
        else:
            for one in (tensors.grads, tensors.states[0]):
                one[0].zero_()
        check_step(rule, tensors, weight_decay=0.0)


# ---- learning rate in a tensor, gradient scale, infinities ----


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_in_a_tensor(backend: Backend, rule: Rule, dtype: torch.dtype) -> None:
    tensors = random_tensors(rule, [9, 33], device=backend.device)
    other = copies(tensors)
    rule.by_lists(tensors, {**rule.options, "lr": 0.125})
    lr = torch.tensor(0.125, dtype=dtype)
    rule.by_lists(other, {**rule.options, "lr": 77.0, "lr_tensor": lr})
    assert_equal(tensors, other)


@rules
@dtypes
def test_scaled_gradients(backend: Backend, rule: Rule, dtype: torch.dtype) -> None:
    """A power of two is divided out without a trace."""
    tensors = random_tensors(rule, [9, (), 0, 65], dtype, backend.device, steps=(0.0, 2.0))
    other = copies(tensors)
    other.grads = [grad * 8 for grad in other.grads]
    kept = [grad.clone() for grad in other.grads]
    scale = torch.tensor(8.0, device=backend.device)
    zero = torch.tensor(0.0, device=backend.device)
    rule.by_lists(tensors, rule.options)
    extra = {"found_inf": zero} if backend.device == "cpu" and backend.name != "simt" else {}
    rule.by_lists(other, {**rule.options, "grad_scale": scale, **extra})
    assert all(map(torch.equal, other.grads, kept))
    other.grads = tensors.grads
    assert_equal(tensors, other)


@rules
def test_nothing_happens_where_an_infinity_was_found(backend: Backend, rule: Rule) -> None:
    """`tests/optim/test_every_rule.py` has the same through the optimizers."""
    if backend.device == "cuda":
        pytest.skip("on a GPU the counters must be there too; tests/simt, tests/triton")
    tensors = random_tensors(rule, [9, 0, 33], device=backend.device, steps=(2.0,))
    before = copies(tensors)
    rule.by_lists(tensors, {**rule.options, "found_inf": torch.tensor(1.0)})
    assert_equal(tensors, before)


# ---- the op itself ----


@rules
def test_opcheck(backend: Backend, rule: Rule) -> None:
    if backend.slow:
        pytest.skip("one schema for all: interpreting the kernels adds nothing")
    tensors = random_tensors(rule, [3, (2, 4)], device=backend.device)
    overload = "reference" if backend.name == "reference" else "default"
    op = getattr(getattr(torch.ops.effkern, f"_{rule.name}_"), overload)
    for changed in rule.branches:
        options = {**rule.options, **changed}
        torch.library.opcheck(op, tuple(rule.passed(tensors, options)), options)
    lr = torch.tensor(0.1)
    torch.library.opcheck(
        op, tuple(rule.passed(tensors, rule.options)), {**rule.options, "lr_tensor": lr}
    )


@rules
def test_version_counters_rise(backend: Backend, rule: Rule) -> None:
    if backend.name == "simt":
        pytest.skip("an overload for tests alone")
    tensors = random_tensors(rule, [3, 5], device=backend.device)
    passed = rule.passed(tensors, rule.options)
    before = [[t._version for t in one] for one in passed]
    rule.by_lists(tensors, rule.options)
    for i, (one, then) in enumerate(zip(passed, before, strict=True)):
        now = [t._version for t in one]
        assert now == then if i == 1 else all(map(int.__gt__, now, then))
