"""What the op on lists refuses: one error that names the argument, and nothing written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.adam import OPTIONS, Tensors, by_lists, random_tensors
from tests.support.backends import Backend


def _replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def spoil(tensors: Tensors) -> None:
        getattr(tensors, name)[-1] = change(getattr(tensors, name)[-1])

    return spoil


def _shorten(name: str) -> Callable[..., None]:
    return lambda tensors: getattr(tensors, name).pop()


SPOILED = {
    "params integer": (_replace("params", lambda t: t.int()), r"params\[1\]"),
    "params another dtype": (_replace("params", lambda t: t.double()), r"params\[1\]"),
    "grads integer": (_replace("grads", lambda t: t.int()), r"grads\[1\]"),
    "grads another dtype": (_replace("grads", lambda t: t.bfloat16()), r"grads\[1\]"),
    "grads another shape": (_replace("grads", lambda t: t[:2]), r"grads\[1\]"),
    "grads another rank": (_replace("grads", lambda t: t.view(-1)), r"grads\[1\]"),
    "exp_avgs another shape": (_replace("exp_avgs", lambda t: t.t()), r"exp_avgs\[1\]"),
    "exp_avg_sqs another dtype": (
        _replace("exp_avg_sqs", lambda t: t.double()),
        r"exp_avg_sqs\[1\]",
    ),
    "max_exp_avg_sqs another shape": (
        _replace("max_exp_avg_sqs", lambda t: t[:, :1]),
        r"max_exp_avg_sqs\[1\]",
    ),
    "too few grads": (_shorten("grads"), "grads has 1 tensors"),
    "too few exp_avgs": (_shorten("exp_avgs"), "exp_avgs has 1 tensors"),
    "too few exp_avg_sqs": (_shorten("exp_avg_sqs"), "exp_avg_sqs has 1 tensors"),
    "too few max_exp_avg_sqs": (_shorten("max_exp_avg_sqs"), "max_exp_avg_sqs has 1 tensors"),
    "too few steps": (_shorten("steps"), "steps has 1 tensors"),
    "steps of two numbers": (_replace("steps", lambda t: torch.zeros(2)), r"steps\[1\]"),
    "steps integer": (_replace("steps", lambda t: t.int()), r"steps\[1\]"),
}
STRIDES = {
    "params with gaps": (
        _replace("params", lambda t: torch.randn(3, 8)[:, ::2]),
        r"params\[1\].*strides",
    ),
    "grads transposed": (
        _replace("grads", lambda t: t.t().contiguous().t()),
        r"grads\[1\].*strides",
    ),
    "exp_avgs transposed": (
        _replace("exp_avgs", lambda t: t.t().contiguous().t()),
        r"exp_avgs\[1\].*strides",
    ),
}


@pytest.mark.parametrize("case", [*SPOILED, *STRIDES])
def test_refused_and_nothing_written(backend: Backend, case: str) -> None:
    if case in STRIDES and backend.name == "reference":
        pytest.skip("the reference takes any strides")
    if backend.device == "cuda" and case in STRIDES:
        pytest.skip("made on the CPU")
    spoil, message = {**SPOILED, **STRIDES}[case]
    tensors = random_tensors([5, (3, 4)], device=backend.device)
    kept = tensors.clone()
    spoil(tensors)
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        by_lists(tensors, {**OPTIONS, "amsgrad": True})
    for mine, before in zip(tensors.lists(), kept.lists(), strict=True):
        assert torch.equal(mine[0].cpu(), before[0])
