"""The check of tests/ops/test_norm_attention.py fails for every kernel that does all of attention
and is broken in a likely way.
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
def _by_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way("by scores", monkeypatch)


def run_the_check() -> None:
    q, k, v = tensors(2, 4, 70, 70, 16, key_heads=2)
    q = q * torch.logspace(-2, 1, 70)[torch.randperm(70)][:, None]
    tau = torch.tensor(0.8)
    rows = torch.rand(2, 4, 70, 70) > 0.3
    bias = torch.where(rows, torch.randn(70, 70), torch.finfo().min)
    for keywords in (
        {},
        {"is_causal": True},
        {"attn_mask": padding(2, 70)},
        {"attn_mask": rows},
        {"attn_mask": bias},
    ):
        check(q, k, v + 0.5, tau=tau, eps=0.1, enable_gqa=True, **keywords)


# What is done to the forward kernel: f(q, k, v, mask, tau, eps, scale, causal).


def is_the_softmax(f: Any, q: Any, k: Any, v: Any, mask: Any, tau: Any, *rest: Any) -> Any:
    return f(q, k, v, mask, tau, 1.0, *rest[1:])


def always_divides_by_sigma(f: Any, q: Any, k: Any, v: Any, mask: Any, tau: Any, *rest: Any) -> Any:
    return f(q, k, v, mask, torch.full_like(tau, 1e30), *rest)


def forgets_eps(f: Any, q: Any, k: Any, v: Any, mask: Any, tau: Any, eps: Any, *rest: Any) -> Any:
    return f(q, k, v, mask, tau, 0.0, *rest)


def sees_hidden_keys(f: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> Any:
    return f(q, k, v, None, *rest)


def shifts_the_mask_by_a_row(f: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> Any:
    return f(q, k, v, mask if mask is None else mask.roll(1, 2), *rest)


def shifts_the_mask_by_a_head(f: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> Any:
    return f(q, k, v, mask if mask is None else mask.roll(1, 1), *rest)


def forgets_the_bias(f: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> Any:
    adds = mask is not None and mask.dtype != torch.bool
    return f(q, k, v, mask > -1e30 if adds else mask, *rest)


def sees_later_keys(f: Any, *call: Any) -> Any:
    return f(*call[:-1], False)


def sees_one_key_less(f: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return f(q, torch.cat((k[:, :, :-1], k[:, :, :1]), 2), v, *rest)


def forgets_the_scale(f: Any, *call: Any) -> Any:
    return f(*call[:-2], 1.0, call[-1])


def mixes_up_the_heads_of_values(f: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return f(q, k, v.flip(1), *rest)


def skips_the_last_row(f: Any, *call: Any) -> Any:
    y = f(*call)
    y[:, :, -1] = 0
    return y


# What is done to the backward kernel: f(grad, q, k, v, mask, tau, eps, scale, causal, wants_tau).


def drops_a_head_of_a_group(f: Any, grad: Tensor, *rest: Any) -> Any:
    of_q, _, _, of_tau = f(grad, *rest)
    fewer = grad.clone()
    fewer[:, 1] = 0
    _, of_k, of_v, _ = f(fewer, *rest)
    return of_q, of_k, of_v, of_tau


def misses_the_term_through_sigma(f: Any, grad: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    """As the softmax's of scores at temperature eps."""
    mask, tau, _, *others = rest
    _, _, of_v, of_tau = f(grad, q, k, v, *rest)
    of_q, of_k, _, _ = f(grad, q, k, v, mask, tau, 0.8, *others)
    return of_q, of_k, of_v, of_tau


def forgets_the_scale_of_keys(f: Any, grad: Any, *rest: Any) -> Any:
    of_q, of_k, of_v, of_tau = f(grad, *rest)
    return of_q, of_k / rest[-3], of_v, of_tau


def turns_tau_around(f: Any, *call: Any) -> Any:
    *found, of_tau = f(*call)
    return *found, -of_tau


def lets_hidden_values_through(
    f: Any, grad: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any
) -> Any:
    of_q, of_k, _, of_tau = f(grad, q, k, v, mask, *rest)
    return of_q, of_k, f(grad, q, k, v, None, *rest)[2], of_tau


FORWARD = [
    is_the_softmax,
    always_divides_by_sigma,
    forgets_eps,
    sees_hidden_keys,
    shifts_the_mask_by_a_row,
    shifts_the_mask_by_a_head,
    forgets_the_bias,
    sees_later_keys,
    sees_one_key_less,
    forgets_the_scale,
    mixes_up_the_heads_of_values,
    skips_the_last_row,
]
BACKWARD = [
    drops_a_head_of_a_group,
    misses_the_term_through_sigma,
    forgets_the_scale_of_keys,
    turns_tau_around,
    lets_hidden_values_through,
]


def test_the_reference_passes() -> None:
    with mutant("sound_by_scores"):
        run_the_check()


@pytest.mark.parametrize("change", FORWARD, ids=lambda f: f.__name__)
def test_a_broken_forward_fails(change: Callable[..., Any]) -> None:
    with (
        mutant(f"by_scores_{change.__name__}", attention_by_scores_forward=change),
        pytest.raises(AssertionError),
    ):
        run_the_check()


@pytest.mark.parametrize("change", BACKWARD, ids=lambda f: f.__name__)
def test_a_broken_backward_fails(change: Callable[..., Any]) -> None:
    with (
        mutant(f"by_scores_{change.__name__}", attention_by_scores_backward=change),
        pytest.raises(AssertionError),
    ):
        run_the_check()
