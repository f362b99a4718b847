"""The check of tests/support/adam.py fails for every Adam that is broken in a likely way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.adam import check_step, random_tensors
from tests.support.mutants import mutant


def run_the_check() -> None:
    for options in (
        {},
        {"decoupled": True},
        {"maximize": True},
        {"amsgrad": True},
        {"weight_decay": 0.0},
    ):
        tensors = random_tensors([5, (3, 11), 2], steps=(0.0, 3.0))
        check_step(tensors, **options)
        check_step(tensors, **options)


def no_op(f: Any, *lists: Any, **options: Any) -> None:
    pass


def swaps_betas(f: Any, *lists: Any, **options: Any) -> None:
    options["beta1"], options["beta2"] = options["beta2"], options["beta1"]
    f(*lists, **options)


def misses_bias_correction(f: Any, *lists: Any, **options: Any) -> None:
    steps = lists[-1]
    late = [step.clone().fill_(1e6) for step in steps]
    f(*lists[:-1], late, **options)
    for step in steps:
        step += 1


def decays_the_gradient_instead(f: Any, *lists: Any, **options: Any) -> None:
    f(*lists, **{**options, "decoupled": False})


def decays_the_parameter_instead(f: Any, *lists: Any, **options: Any) -> None:
    f(*lists, **{**options, "decoupled": True})


def forgets_decay(f: Any, *lists: Any, **options: Any) -> None:
    f(*lists, **{**options, "weight_decay": 0.0})


def skips_the_last_tensor(f: Any, *lists: Any, **options: Any) -> None:
    f(*(one[:-1] for one in lists), **options)
    lists[-1][-1].add_(1)


def skips_the_first_tensor(f: Any, *lists: Any, **options: Any) -> None:
    f(*(one[1:] for one in lists), **options)
    lists[-1][0].add_(1)


def skips_the_last_element(f: Any, *lists: Any, **options: Any) -> None:
    kept = [t.view(-1)[-1].clone() for one in lists[:-1] for t in one]
    f(*lists, **options)
    for t, value in zip((t for one in lists[:-1] for t in one), kept, strict=True):
        t.view(-1)[-1] = value


def leaves_the_states(f: Any, *lists: Any, **options: Any) -> None:
    params, grads, *states, steps = lists
    f(params, grads, *([t.clone() for t in one] for one in states), steps, **options)


def uses_the_last_step(f: Any, *lists: Any, **options: Any) -> None:
    """Counts after the update instead of before it."""
    *values, steps = lists
    stale = [(step - 1).clamp(min=0) for step in steps]
    f(*values, stale, **options)
    for step in steps:
        step += 1


def does_not_count(f: Any, *lists: Any, **options: Any) -> None:
    *values, steps = lists
    f(*values, [step.clone() for step in steps], **options)


def uses_one_step_for_all(f: Any, *lists: Any, **options: Any) -> None:
    *values, steps = lists
    f(*values, [steps[0].clone() for _ in steps], **options)
    for step in steps:
        step += 1


def ignores_maximize(f: Any, *lists: Any, **options: Any) -> None:
    f(*lists, **{**options, "maximize": False})


def ignores_amsgrad(f: Any, *lists: Any, **options: Any) -> None:
    f(*lists[:4], [], lists[-1], **{**options, "amsgrad": False})


def adds_eps_under_the_root(f: Any, *lists: Any, **options: Any) -> None:
    f(*lists, **{**options, "eps": options["eps"] ** 2})


def writes_the_gradient(f: Any, *lists: Any, **options: Any) -> None:
    f(*lists, **options)
    lists[1][0].zero_()


BROKEN = [
    no_op,
    swaps_betas,
    misses_bias_correction,
    decays_the_gradient_instead,
    decays_the_parameter_instead,
    forgets_decay,
    skips_the_last_tensor,
    skips_the_first_tensor,
    skips_the_last_element,
    leaves_the_states,
    uses_the_last_step,
    does_not_count,
    uses_one_step_for_all,
    ignores_maximize,
    ignores_amsgrad,
    adds_eps_under_the_root,
    writes_the_gradient,
]


def test_the_reference_passes() -> None:
    with mutant("sound_adam"):
        run_the_check()


@pytest.mark.parametrize("change", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_step_fails(change: Callable[..., None]) -> None:
    with mutant(f"adam_{change.__name__}", adam=change), pytest.raises(AssertionError):
        run_the_check()
