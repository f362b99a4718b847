"""What the ops on lists refuse: one error that names the argument, and nothing written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.backends import Backend
from tests.support.rules import RULES, Rule, random_tensors

Lists = dict[str, list[Tensor]]


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Lists], None]:
    def spoil(lists: Lists) -> None:
        lists[name][-1] = change(lists[name][-1])

    return spoil


def _shorten(name: str) -> Callable[[Lists], object]:
    return lambda lists: lists[name].pop()


def of_lists(name: str) -> dict[str, tuple[Callable[[Lists], object], str]]:
    """What is refused of gradients and of any list of states."""
    return {
        f"{name} of another dtype": (_replace(name, lambda t: t.double()), rf"{name}\[1\]"),
        f"{name} of another shape": (_replace(name, lambda t: t[:2]), rf"{name}\[1\]"),
        f"{name} of another rank": (_replace(name, lambda t: t.view(-1)), rf"{name}\[1\]"),
        f"too few {name}": (_shorten(name), f"{name} has 1 tensors"),
    }


ALWAYS: dict[str, tuple[Callable[[Lists], object], str]] = {
    "params integer": (_replace("params", lambda t: t.int()), r"params\[1\]"),
    "params of another dtype": (_replace("params", lambda t: t.double()), r"params\[1\]"),
    "too few steps": (_shorten("steps"), "steps has 1 tensors"),
    "steps of two numbers": (_replace("steps", lambda t: torch.zeros(2)), r"steps\[1\]"),
    "steps integer": (_replace("steps", lambda t: t.int()), r"steps\[1\]"),
}


def cases() -> list[tuple[Rule, str, Callable[[Lists], object], str]]:
    found = []
    for rule in RULES:
        spoiled = {**ALWAYS, **of_lists("grads")}
        for name in rule.ops.states:
            spoiled.update(of_lists(name))
        found += [(rule, what, spoil, message) for what, (spoil, message) in spoiled.items()]
    return found


STRIDES = {
    "params with gaps": (
        _replace("params", lambda t: torch.randn(3, 8)[:, ::2]),
        r"params\[1\].*strides",
    ),
    "grads transposed": (
        _replace("grads", lambda t: t.t().contiguous().t()),
        r"grads\[1\].*strides",
    ),
}


def check(backend: Backend, rule: Rule, spoil: Callable[[Lists], object], message: str) -> None:
    options = {**rule.options, **({"amsgrad": True} if rule.name == "adam" else {})}
    tensors = random_tensors(rule, [5, (3, 4)], device=backend.device)
    kept = tensors.clone()
    names = ["params", "grads", *rule.ops.states, "steps"]
    lists = dict(zip(names, map(list, tensors.lists()), strict=True))
    spoil(lists)
    (kernel,) = rule.ops.from_lists(tensors.params[0])
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        kernel(*lists.values(), [], [], [], **options)
    for mine, before in zip(tensors.lists(), kept.lists(), strict=True):
        assert torch.equal(mine[0].cpu(), before[0])


@pytest.mark.parametrize(
    ("rule", "what", "spoil", "message"), cases(), ids=lambda x: getattr(x, "name", None)
)
def test_refused_and_nothing_written(
    backend: Backend, rule: Rule, what: str, spoil: Callable[[Lists], object], message: str
) -> None:
    check(backend, rule, spoil, message)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("case", STRIDES)
def test_strides(backend: Backend, rule: Rule, case: str) -> None:
    if backend.name == "reference":
        pytest.skip("the reference takes any strides")
    if backend.device == "cuda":
        pytest.skip("made on the CPU")
    check(backend, rule, *STRIDES[case])


@pytest.mark.parametrize("name", ["lr_tensor", "grad_scale", "found_inf"])
@pytest.mark.parametrize("value", [torch.ones(2), torch.ones((), dtype=torch.int64)], ids=repr)
def test_numbers_in_tensors(backend: Backend, name: str, value: Tensor) -> None:
    if backend.name == "reference":
        pytest.skip("the definition takes any number")
    rule = RULES[0]
    tensors = random_tensors(rule, [5], device=backend.device)
    kept = tensors.clone()
    with pytest.raises(RuntimeError, match=f"{name} must be one float32 or float64 number"):
        rule.by_lists(tensors, {**rule.options, name: value.to(backend.device)})
    assert torch.equal(tensors.params[0].cpu(), kept.params[0])
