"""The check of tests/ops/test_norm_attention.py fails for every kernel that divides queries and is
broken in a likely way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_norm_attention import check, padding, tensors
from tests.support.mutants import mutant
from tests.support.norm_attention import choose_way


@pytest.fixture(autouse=True)
def _divided(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way("divided", monkeypatch)


def run_the_check() -> None:
    q, k, v = tensors(2, 4, 70, 70, 16, key_heads=2)
    q = q * torch.logspace(-2, 1, 70)[torch.randperm(70)][:, None]
    tau = torch.tensor(0.8)
    for keywords in ({}, {"is_causal": True}, {"attn_mask": padding(2, 70)}):
        check(q, k, v + 0.5, tau=tau, eps=0.1, enable_gqa=True, **keywords)


# What is done to the forward kernel: f(q, k, seen, tau, eps, scale, causal).


def divides_by_nothing(f: Any, q: Tensor, *rest: Any) -> Any:
    _, offset, deviation = f(q, *rest)
    return q.clone(), offset, deviation


def always_divides_by_sigma(
    f: Any, q: Tensor, k: Tensor, seen: Any, tau: Tensor, *rest: Any
) -> Any:
    return f(q, k, seen, torch.full_like(tau, 1e30), *rest)


def forgets_eps(
    f: Any, q: Tensor, k: Tensor, seen: Any, tau: Tensor, eps: float, *rest: Any
) -> Any:
    return f(q, k, seen, tau, 0.0, *rest)


def divides_by_the_variance(
    f: Any, q: Tensor, k: Tensor, seen: Any, tau: Tensor, *rest: Any
) -> Any:
    _, offset, deviation = f(q, k, seen, tau, *rest)
    by = torch.minimum(deviation.square(), tau).clamp(min=rest[0])
    return q / by[..., None], offset, deviation


def counts_one_key_less(f: Any, q: Tensor, k: Tensor, seen: Any, tau: Tensor, *rest: Any) -> Any:
    """The sample deviation."""
    _, offset, deviation = f(q, k, seen, tau, *rest)
    larger = deviation * (k.shape[-2] / (k.shape[-2] - 1)) ** 0.5
    by = torch.minimum(larger, tau).clamp(min=rest[0])
    return q / by[..., None], offset, deviation


def forgets_the_mean(f: Any, q: Tensor, k: Tensor, *rest: Any) -> Any:
    far = torch.cat((k, -k), -2)
    return f(q, k if rest[0] is not None else far, *rest)[0], *f(q, k, *rest)[1:]


def sees_hidden_keys(f: Any, q: Tensor, k: Tensor, seen: Any, *rest: Any) -> Any:
    scaled, _, _ = f(q, k, None, *rest)
    _, offset, deviation = f(q, k, seen, *rest)
    return scaled, offset, deviation


def sees_later_keys(f: Any, q: Tensor, k: Tensor, seen: Any, *rest: Any) -> Any:
    *options, _ = rest
    return f(q, k, seen, *options, False)


def forgets_the_scale(
    f: Any, q: Tensor, k: Tensor, seen: Any, tau: Any, eps: Any, *rest: Any
) -> Any:
    return f(q, k, seen, tau, eps, 1.0, rest[-1])


def mixes_up_the_heads(f: Any, q: Tensor, k: Tensor, *rest: Any) -> Any:
    scaled = f(q, k.flip(1), *rest)[0]
    return scaled, *f(q, k, *rest)[1:]


def skips_the_last_row(f: Any, q: Tensor, *rest: Any) -> Any:
    scaled, offset, deviation = f(q, *rest)
    scaled[:, :, -1] = q[:, :, -1]
    return scaled, offset, deviation


# What is done to the backward kernel: f(grad_q, grad_k, q, k, seen, deviation, tau, ...).


def misses_the_term_through_sigma(
    f: Any, grad_q: Any, grad_k: Any, q: Any, k: Any, seen: Any, deviation: Tensor, *rest: Any
) -> Any:
    tau, eps = rest[0], rest[1]
    by = torch.minimum(deviation, tau).clamp(min=eps)[..., None]
    return grad_q / by, grad_k, f(grad_q, grad_k, q, k, seen, deviation, *rest)[2]


def lets_eps_through(
    f: Any,
    grad_q: Any,
    grad_k: Any,
    q: Any,
    k: Any,
    seen: Any,
    deviation: Tensor,
    tau: Any,
    eps: float,
    *rest: Any,
) -> Any:
    lifted = deviation.clamp(min=eps)
    return f(grad_q, grad_k, q, k, seen, lifted, tau, eps, *rest)


def forgets_the_keys(f: Any, grad_q: Any, grad_k: Any, *rest: Any) -> Any:
    of_q, _, of_divisor = f(grad_q, grad_k, *rest)
    return of_q, grad_k.clone(), of_divisor


def forgets_the_softmaxs_keys(f: Any, grad_q: Any, grad_k: Any, *rest: Any) -> Any:
    return f(grad_q, None, *rest)


def drops_a_head_of_a_group(f: Any, grad_q: Tensor, *rest: Any) -> Any:
    of_q, _, of_divisor = f(grad_q, *rest)
    fewer = grad_q.clone()
    fewer[:, 1] = 0
    return of_q, f(fewer, *rest)[1], of_divisor


def turns_tau_around(f: Any, *call: Any) -> Any:
    of_q, of_k, of_divisor = f(*call)
    return of_q, of_k, -of_divisor


FORWARD = [
    divides_by_nothing,
    always_divides_by_sigma,
    forgets_eps,
    divides_by_the_variance,
    counts_one_key_less,
    forgets_the_mean,
    sees_hidden_keys,
    sees_later_keys,
    forgets_the_scale,
    mixes_up_the_heads,
    skips_the_last_row,
]
BACKWARD = [
    misses_the_term_through_sigma,
    lets_eps_through,
    forgets_the_keys,
    forgets_the_softmaxs_keys,
    drops_a_head_of_a_group,
    turns_tau_around,
]


def test_the_reference_passes() -> None:
    with mutant("sound_attention"):
        run_the_check()


@pytest.mark.parametrize("change", FORWARD, ids=lambda f: f.__name__)
def test_a_broken_forward_fails(change: Callable[..., Any]) -> None:
    with (
        mutant(f"attention_{change.__name__}", norm_attention_forward=change),
        pytest.raises(AssertionError),
    ):
        run_the_check()


@pytest.mark.parametrize("change", BACKWARD, ids=lambda f: f.__name__)
def test_a_broken_backward_fails(change: Callable[..., Any]) -> None:
    with (
        mutant(f"attention_{change.__name__}", norm_attention_backward=change),
        pytest.raises(AssertionError),
    ):
        run_the_check()
