"""The check of tests/ops/test_rms_norm.py fails for every kernel that is broken in a likely way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_rms_norm import check
from tests.support.mutants import mutant


def run_the_check() -> None:
    x, r = torch.randn(6, 40), torch.randn(6, 40)
    check(x, torch.rand(40), r, eps=0.1, grad=torch.randn_like(x))
    check(x, torch.rand(40), eps=0.1, grad=torch.randn_like(x))


def no_op(f: Any, x: Tensor, residual: Any, weight: Any, dims: int, eps: float) -> Any:
    _, total, rstd = f(x, residual, weight, dims, eps)
    return (x if residual is None else total).clone(), total, rstd


def ignores_weight(f: Any, x: Tensor, residual: Any, weight: Any, dims: int, eps: float) -> Any:
    return f(x, residual, None, dims, eps)


def ignores_eps(f: Any, x: Tensor, residual: Any, weight: Any, dims: int, eps: float) -> Any:
    return f(x, residual, weight, dims, 0.0)


def centres(f: Any, x: Tensor, residual: Any, weight: Any, dims: int, eps: float) -> Any:
    return f(x - x.mean(-1, keepdim=True), residual, weight, dims, eps)


def skips_the_last_feature(
    f: Any, x: Tensor, residual: Any, weight: Any, dims: int, eps: float
) -> Any:
    y, total, rstd = f(x, residual, weight, dims, eps)
    y[..., -1] = 0
    return y, total, rstd


def skips_the_last_row(f: Any, x: Tensor, residual: Any, weight: Any, dims: int, eps: float) -> Any:
    y, total, rstd = f(x, residual, weight, dims, eps)
    y[-1] = 0
    return y, total, rstd


def statistics_without_the_residual(
    f: Any, x: Tensor, residual: Any, weight: Any, dims: int, eps: float
) -> Any:
    y, total, rstd = f(x, residual, weight, dims, eps)
    alone = f(x, None, weight, dims, eps)[2]
    return y * (alone / rstd)[..., None], total, alone


def misses_the_projection(f: Any, grad: Tensor, grad_total: Any, x: Tensor, *rest: Any) -> Any:
    _, grad_weight = f(grad, grad_total, x, *rest)
    weight, rstd = rest[0], rest[1]
    total = 0 if grad_total is None else grad_total
    return grad * weight * rstd[..., None] + total, grad_weight


def forgets_the_sums_gradient(f: Any, grad: Tensor, grad_total: Any, *rest: Any) -> Any:
    return f(grad, None, *rest)


def ignores_weight_in_grad_x(
    f: Any, grad: Tensor, grad_total: Any, x: Tensor, weight: Any, *rest: Any
) -> Any:
    return (
        f(grad, grad_total, x, torch.ones_like(weight), *rest)[0],
        f(grad, grad_total, x, weight, *rest)[1],
    )


def drops_a_row_from_grad_weight(f: Any, grad: Tensor, *rest: Any) -> Any:
    shortened = grad.clone()
    shortened[-1] = 0
    return f(grad, *rest)[0], f(shortened, *rest)[1]


def with_residual(f: Any) -> Any:
    """The kernel without a residual, called as if it took one."""

    def forward(x: Tensor, residual: None, *rest: Any) -> Any:
        y, rstd = f(x, *rest)
        return y, x.new_empty(0), rstd

    return forward


FORWARD = [
    no_op,
    ignores_weight,
    ignores_eps,
    centres,
    skips_the_last_feature,
    skips_the_last_row,
    statistics_without_the_residual,
]
BACKWARD = [
    misses_the_projection,
    forgets_the_sums_gradient,
    ignores_weight_in_grad_x,
    drops_a_row_from_grad_weight,
]


def test_the_reference_passes() -> None:
    with mutant("sound_rms_norm"):
        run_the_check()


@pytest.mark.parametrize("change", FORWARD, ids=lambda f: f.__name__)
def test_a_broken_forward_fails(change: Callable[..., Any]) -> None:
    def without_residual(f: Any, x: Tensor, *rest: Any) -> Any:
        y, _, rstd = change(with_residual(f), x, None, *rest)
        return y, rstd

    broken = {"rms_norm_forward": without_residual, "add_rms_norm_forward": change}
    with mutant(change.__name__, **broken), pytest.raises(AssertionError):
        run_the_check()


@pytest.mark.parametrize("change", BACKWARD, ids=lambda f: f.__name__)
def test_a_broken_backward_fails(change: Callable[..., Any]) -> None:
    with mutant(change.__name__, rms_norm_backward=change), pytest.raises(AssertionError):
        run_the_check()
