"""The check of tests/ops/test_norm_softmax.py fails for every kernel that is broken in a likely
way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern.backends.reference import norm_softmax as reference
from tests.support.mutants import mutant
from tests.support.softmaxes import check, rows_of_every_branch


def run_the_check() -> None:
    x = rows_of_every_branch(24)
    bias = torch.randn(7, 24)
    bias[:, ::5] = torch.finfo(torch.float32).min
    bias[0] = float("-inf")
    for mask in (None, torch.rand(7, 24) > 0.4, bias):
        check(x, mask=mask)
        check(x.t(), 0, tau=0.5, mask=None if mask is None else mask.t())


# What is done to the forward kernel: f(x, mask, tau, tau_value, eps, dim) -> y.


def plain_softmax(f: Any, x: Tensor, *rest: Any) -> Tensor:
    return torch.softmax(x, rest[-1])


def wrong_dimension(f: Any, x: Tensor, *rest: Any) -> Tensor:
    return f(x.transpose(0, 1), *(_turned(each) for each in rest)).transpose(0, 1).contiguous()


def _turned(value: Any) -> Any:
    return value.transpose(0, 1) if isinstance(value, Tensor) and value.dim() == 2 else value


def sample_deviation(f: Any, x: Tensor, mask: Any, tau: Any, *rest: Any) -> Tensor:
    n = x.shape[rest[-1]]
    return f(x * ((n - 1) / n) ** 0.5, mask, tau, *rest)


def variance(f: Any, x: Tensor, mask: Any, tau: Any, value: float, eps: float, dim: int) -> Tensor:
    divisor = x.var(dim, correction=0, keepdim=True).clamp(max=1.0).clamp(min=eps)
    return reference._softmax(x / divisor, *reference.split_mask(mask), dim)


def ignores_tau(f: Any, x: Tensor, mask: Any, tau: Any, *rest: Any) -> Tensor:
    return f(x, mask, torch.tensor(1e30), *rest)


def ignores_eps(f: Any, *rest: Any) -> Tensor:
    *others, _, dim = rest
    return f(*others, 1e-20, dim)


def ignores_mask(f: Any, x: Tensor, mask: Any, *rest: Any) -> Tensor:
    return f(x, None, *rest)


def bias_in_the_statistics(f: Any, x: Tensor, mask: Any, *rest: Any) -> Tensor:
    visible, bias = reference.split_mask(mask)
    return f(x if bias is None else x + bias, visible, *rest)


def hidden_in_the_statistics(f: Any, x: Tensor, mask: Any, *rest: Any) -> Tensor:
    if mask is None:
        return f(x, mask, *rest)
    visible, bias = reference.split_mask(mask)
    return f(x, torch.where(visible, 0.0 if bias is None else bias, -1e9), *rest)


def hidden_row_uniform(f: Any, x: Tensor, mask: Any, *rest: Any) -> Tensor:
    y = f(x, mask, *rest)
    empty = (y == 0).all(rest[-1], keepdim=True)
    return torch.where(empty, 1 / x.shape[rest[-1]], y)


def skips_the_last_element(f: Any, *rest: Any) -> Tensor:
    y = f(*rest)
    y.select(rest[-1], -1).zero_()
    return y


def skips_the_last_row(f: Any, *rest: Any) -> Tensor:
    y = f(*rest)
    y.select(1 - rest[-1], -1).zero_()
    return y


# What is done to the backward kernel: f(grad, x, mask, tau, value, eps, dim, wants...).


def without_sigma(f: Any, grad: Tensor, x: Tensor, mask: Any, tau: Any, *rest: Any) -> Any:
    """The gradient of a constant divisor."""
    value, eps, dim, *wants = rest
    visible, _ = reference.split_mask(mask)
    row = reference.centred(x, visible, dim)
    divisor = reference.divisor(row.variance, row.entries, tau, eps)
    y = reference.norm_softmax(x, mask, tau, eps, dim)
    _, grad_tau = f(grad, x, mask, tau, value, eps, dim, *wants)
    return reference.grad_of_logits(grad, y, dim) / divisor, grad_tau


def sigma_everywhere(f: Any, grad: Tensor, x: Tensor, mask: Any, tau: Any, *rest: Any) -> Any:
    _, grad_tau = f(grad, x, mask, tau, *rest)
    value, _, *others = rest
    return f(grad, x, mask, torch.tensor(1e30), value, 0.0, *others)[0], grad_tau


def misses_the_sum(f: Any, grad: Tensor, x: Tensor, mask: Any, tau: Any, *rest: Any) -> Any:
    value, eps, dim, *wants = rest
    y = reference.norm_softmax(x, mask, tau, eps, dim)
    shift = (y * grad).sum(dim, keepdim=True)
    return f(grad - shift * y, x, mask, tau, value, eps, dim, *wants)


def grad_tau_everywhere(f: Any, grad: Tensor, x: Tensor, mask: Any, tau: Any, *rest: Any) -> Any:
    grad_x, _ = f(grad, x, mask, tau, *rest)
    value, _, *others = rest
    return grad_x, f(grad, x * 1e4, mask, tau, value, 0.0, *others)[1] / 1e4


def grad_tau_of_wrong_sign(f: Any, *rest: Any) -> Any:
    grad_x, grad_tau = f(*rest)
    return grad_x, -grad_tau


def drops_a_row_from_tau(f: Any, *rest: Any) -> Any:
    grad_x, grad_tau = f(*rest)
    grad_tau[-1] = 0
    return grad_x, grad_tau


def ignores_the_mask_in_the_gradient(f: Any, grad: Tensor, x: Tensor, _: Any, *rest: Any) -> Any:
    return f(grad, x, None, *rest)


FORWARD = [
    plain_softmax,
    wrong_dimension,
    sample_deviation,
    variance,
    ignores_tau,
    ignores_eps,
    ignores_mask,
    bias_in_the_statistics,
    hidden_in_the_statistics,
    hidden_row_uniform,
    skips_the_last_element,
    skips_the_last_row,
]
BACKWARD = [
    without_sigma,
    sigma_everywhere,
    misses_the_sum,
    grad_tau_everywhere,
    grad_tau_of_wrong_sign,
    drops_a_row_from_tau,
    ignores_the_mask_in_the_gradient,
]


def test_the_reference_passes() -> None:
    with mutant("sound_norm_softmax"):
        run_the_check()


@pytest.mark.parametrize("change", FORWARD, ids=lambda f: f.__name__)
def test_a_broken_forward_fails(change: Callable[..., Any]) -> None:
    broken = {"norm_softmax_forward": change}
    with mutant(f"norm_softmax_{change.__name__}", **broken), pytest.raises(AssertionError):
        run_the_check()


@pytest.mark.parametrize("change", BACKWARD, ids=lambda f: f.__name__)
def test_a_broken_backward_fails(change: Callable[..., Any]) -> None:
    broken = {"norm_softmax_backward": change}
    with mutant(f"norm_softmax_{change.__name__}", **broken), pytest.raises(AssertionError):
        run_the_check()
