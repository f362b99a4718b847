"""The check of tests/support/rules.py fails for every rule that is broken in a likely way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.support.mutants import mutant
from tests.support.rules import RULES, Rule, check_step, random_tensors


def run_the_check(rule: Rule) -> None:
    for changed in rule.branches:
        tensors = random_tensors(rule, [5, (3, 11), 2], steps=(0.0, 3.0))
        check_step(rule, tensors, **changed)
        check_step(rule, tensors, **changed)


# Each takes the sound step, its lists, and its options. The lists end with the step counters; those
# behind them are empty here.


def on_plain_lists(change: Callable[..., None]) -> Callable[..., None]:
    def changed(f: Any, *lists: Any, **options: Any) -> None:
        *plain, masters, scales, keys = lists
        assert not masters and not scales and not keys

        def sound(*few: Any, **changed_options: Any) -> None:
            f(*few, masters, scales, keys, **changed_options)

        change(sound, *plain, **options)

    return changed


def count(lists: tuple[Any, ...]) -> None:
    for step in lists[-1]:
        step += 1


def no_op(f: Any, *lists: Any, **options: Any) -> None:
    pass


def only_counts(f: Any, *lists: Any, **options: Any) -> None:
    count(lists)


def skips_the_last_tensor(f: Any, *lists: Any, **options: Any) -> None:
    f(*(one[:-1] for one in lists), **options)
    count((lists[-1][-1:],))


def skips_the_first_tensor(f: Any, *lists: Any, **options: Any) -> None:
    f(*(one[1:] for one in lists), **options)
    count((lists[-1][:1],))


def skips_the_last_element(f: Any, *lists: Any, **options: Any) -> None:
    kept = [t.view(-1)[-1].clone() for one in lists[:-1] for t in one]
    f(*lists, **options)
    for t, value in zip((t for one in lists[:-1] for t in one), kept, strict=True):
        t.view(-1)[-1] = value


def leaves_the_states(f: Any, *lists: Any, **options: Any) -> None:
    params, grads, *states, steps = lists
    f(params, grads, *([t.clone() for t in one] for one in states), steps, **options)


def does_not_count(f: Any, *lists: Any, **options: Any) -> None:
    *values, steps = lists
    f(*values, [step.clone() for step in steps], **options)


def uses_the_last_step(f: Any, *lists: Any, **options: Any) -> None:
    """Counts after the update instead of before it."""
    *values, steps = lists
    f(*values, [(step - 1).clamp(min=0) for step in steps], **options)
    count(lists)


def uses_one_step_for_all(f: Any, *lists: Any, **options: Any) -> None:
    *values, steps = lists
    f(*values, [steps[0].clone() for _ in steps], **options)
    count(lists)


def misses_bias_correction(f: Any, *lists: Any, **options: Any) -> None:
    *values, steps = lists
    f(*values, [step.clone().fill_(1e6) for step in steps], **options)
    count(lists)


def writes_the_gradient(f: Any, *lists: Any, **options: Any) -> None:
    f(*lists, **options)
    lists[1][0].zero_()


def with_option(
    name: str, change: Callable[[Any], Any], f: Any, *lists: Any, **options: Any
) -> None:
    f(*lists, **{**options, name: change(options[name])})


def swaps_betas(f: Any, *lists: Any, **options: Any) -> None:
    options["beta1"], options["beta2"] = options["beta2"], options["beta1"]
    f(*lists, **options)


def swaps_the_first_two_states(f: Any, *lists: Any, **options: Any) -> None:
    params, grads, first, second, *rest = lists
    f(params, grads, second, first, *rest, **options)


GENERAL = [
    no_op,
    only_counts,
    skips_the_last_tensor,
    skips_the_first_tensor,
    skips_the_last_element,
    leaves_the_states,
    writes_the_gradient,
]
COUNTED = [does_not_count, uses_the_last_step, uses_one_step_for_all]

#: Rules whose formula knows the number of the step.
TIMED = ("adam", "sgd", "adagrad", "lamb")


def broken(rule: Rule) -> dict[str, Callable[..., None]]:
    """Every broken form of a rule, by name."""
    forms: dict[str, Callable[..., None]] = {f.__name__: f for f in GENERAL}
    if not rule.counts:
        del forms["only_counts"]
    if rule.counts and rule.name in TIMED:
        forms.update({f.__name__: f for f in COUNTED})
    elif rule.counts:
        forms["does_not_count"] = does_not_count
    if rule.name in ("adam", "lamb"):
        forms["misses_bias_correction"] = misses_bias_correction
    if "beta2" in rule.options:
        forms["swaps_betas"] = swaps_betas
    if rule.name in ("adam", "lamb", "adadelta", "rmsprop"):
        forms["swaps_the_first_two_states"] = swaps_the_first_two_states
    for name, value in rule.options.items():
        if name == "amsgrad" or name == "centered":
            continue  # they decide which lists are given
        change = (lambda v: not v) if isinstance(value, bool) else (lambda v: v * 0.5)
        forms[f"gets {name} wrong"] = partial(with_option, name, change)
    return forms


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_the_reference_passes(rule: Rule) -> None:
    with mutant(f"sound_{rule.name}"):
        run_the_check(rule)


@pytest.mark.parametrize(
    ("rule", "form"),
    [(rule, form) for rule in RULES for form in broken(rule)],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_broken_step_fails(rule: Rule, form: str) -> None:
    change = broken(rule)[form]
    name = f"{rule.name}_{form.replace(' ', '_')}"
    with mutant(name, **{rule.name: on_plain_lists(change)}), pytest.raises(AssertionError):
        run_the_check(rule)
