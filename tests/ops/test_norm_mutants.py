"""The check of tests/ops/test_norm.py fails for every kernel that is broken in a likely way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_norm import check
from tests.support.mutants import mutant
from tests.support.norms import CRMS, LAYER, NORMS, RMS, Norm, every_norm


def run_the_check(norm: Norm) -> None:
    x, r = torch.randn(6, 40) + 0.5, torch.randn(6, 40)
    parameters = norm.random_parameters((40,))
    check(norm, x, *parameters, residual=r, eps=0.1, grad=torch.randn_like(x))
    check(norm, x, *parameters, eps=0.1, grad=torch.randn_like(x))


# What is done to a forward kernel: f(x, residual, *parameters, dims, eps) -> y, total, kept.


def scaled(y: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """Y with another rstd."""
    return (y - bias) * factor[..., None] + bias


def no_op(f: Any, x: Tensor, residual: Any, *rest: Any) -> Any:
    _, total, kept = f(x, residual, *rest)
    return (x if residual is None else total).clone(), total, kept


def ignores_weight(f: Any, x: Tensor, residual: Any, weight: Tensor, *rest: Any) -> Any:
    return f(x, residual, torch.ones_like(weight), *rest)


def ignores_bias(f: Any, x: Tensor, residual: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    return f(x, residual, weight, None, *rest)


def ignores_eps(f: Any, *rest: Any) -> Any:
    return f(*rest[:-1], 0.0)


def centres(f: Any, x: Tensor, residual: Any, *rest: Any) -> Any:
    return f(x - x.mean(-1, keepdim=True), residual, *rest)


def does_not_centre(f: Any, x: Tensor, residual: Any, *rest: Any) -> Any:
    y, total, kept = f(x, residual, *rest)
    mean, rstd = kept
    return y + rest[0] * (mean * rstd)[..., None], total, kept


def sample_variance(f: Any, x: Tensor, residual: Any, *rest: Any) -> Any:
    n = x.shape[-1]
    y, total, (first, rstd) = f(x, residual, *rest)
    variance = (rstd**-2 - rest[-1]) * n / (n - 1)
    new = (variance + rest[-1]).rsqrt()
    return scaled(y, new / rstd, rest[1]), total, torch.stack((first, new))


def forgets_the_implied_feature(f: Any, x: Tensor, residual: Any, *rest: Any) -> Any:
    y, total, (first, rstd) = f(x, residual, *rest)
    d = x.shape[-1] + 1
    new = (rstd**-2 - first.square() / d).rsqrt()
    return scaled(y, new / rstd, rest[1]), total, torch.stack((first, new))


def divides_by_the_stored_features(f: Any, x: Tensor, residual: Any, *rest: Any) -> Any:
    y, total, (first, rstd) = f(x, residual, *rest)
    eps, n = rest[-1], x.shape[-1]
    new = ((rstd**-2 - eps) * (n + 1) / n + eps).rsqrt()
    return scaled(y, new / rstd, rest[1]), total, torch.stack((first, new))


def skips_the_last_feature(f: Any, *rest: Any) -> Any:
    y, total, kept = f(*rest)
    y[..., -1] = 0
    return y, total, kept


def skips_the_last_row(f: Any, *rest: Any) -> Any:
    y, total, kept = f(*rest)
    y[-1] = 0
    return y, total, kept


def statistics_without_the_residual(f: Any, x: Tensor, residual: Any, *rest: Any) -> Any:
    _, total, _ = f(x, residual, *rest)
    if residual is None:
        return f(x, residual, *rest)
    rstd = [f(given, None, *rest)[2].reshape(-1, *x.shape[:-1])[-1] for given in (x, total)]
    y, _, kept = f(total, None, *rest)
    return scaled(y, rstd[0] / rstd[1], rest[1]), total, kept


# What is done to a backward kernel: f(grad, grad_total, x, weight, kept, dims, wants_x, *wants).


def misses_the_projection(
    f: Any, grad: Tensor, grad_total: Any, x: Tensor, weight: Tensor, kept: Tensor, *rest: Any
) -> Any:
    _, *of_parameters = f(grad, grad_total, x, weight, kept, *rest)
    rstd = kept.reshape(-1, *x.shape[:-1])[-1]
    total = 0 if grad_total is None else grad_total
    return grad * weight * rstd[..., None] + total, *of_parameters


def misses_the_mean_of_g(
    f: Any, grad: Tensor, grad_total: Any, x: Tensor, weight: Tensor, kept: Tensor, *rest: Any
) -> Any:
    grad_x, *of_parameters = f(grad, grad_total, x, weight, kept, *rest)
    mean = (grad * weight).mean(-1, keepdim=True)
    return grad_x + mean * kept[1][..., None], *of_parameters


def misses_the_sum(
    f: Any, grad: Tensor, grad_total: Any, x: Tensor, weight: Tensor, kept: Tensor, *rest: Any
) -> Any:
    return f(grad, grad_total, x, weight, torch.stack((kept[0] * 0, kept[1])), *rest)


def forgets_the_sums_gradient(f: Any, grad: Tensor, grad_total: Any, *rest: Any) -> Any:
    return f(grad, None, *rest)


def ignores_weight_in_grad_x(
    f: Any, grad: Tensor, grad_total: Any, x: Tensor, weight: Tensor, *rest: Any
) -> Any:
    grad_x, *_ = f(grad, grad_total, x, torch.ones_like(weight), *rest)
    return grad_x, *f(grad, grad_total, x, weight, *rest)[1:]


def drops_a_row_from_the_parameters(f: Any, grad: Tensor, *rest: Any) -> Any:
    shortened = grad.clone()
    shortened[-1] = 0
    return f(grad, *rest)[0], *f(shortened, *rest)[1:]


def swaps_the_parameters(f: Any, *rest: Any) -> Any:
    grad_x, grad_weight, grad_bias = f(*rest)
    return grad_x, grad_bias, grad_weight


FORWARD = [
    *((norm, no_op) for norm in NORMS),
    *((norm, ignores_weight) for norm in NORMS),
    *((norm, ignores_eps) for norm in NORMS),
    *((norm, skips_the_last_feature) for norm in NORMS),
    *((norm, skips_the_last_row) for norm in NORMS),
    *((norm, statistics_without_the_residual) for norm in NORMS),
    *((norm, centres) for norm in (RMS, CRMS)),
    (CRMS, forgets_the_implied_feature),
    (CRMS, divides_by_the_stored_features),
    (LAYER, does_not_centre),
    (LAYER, sample_variance),
    *((norm, ignores_bias) for norm in NORMS),
]
BACKWARD = [
    *((norm, misses_the_projection) for norm in NORMS),
    *((norm, forgets_the_sums_gradient) for norm in NORMS),
    *((norm, ignores_weight_in_grad_x) for norm in NORMS),
    *((norm, drops_a_row_from_the_parameters) for norm in NORMS),
    (CRMS, misses_the_sum),
    (LAYER, misses_the_mean_of_g),
    *((norm, swaps_the_parameters) for norm in NORMS),
]


def name_of(value: Any) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else str(value)


@every_norm
def test_the_reference_passes(norm: Norm) -> None:
    with mutant(f"sound_{norm}"):
        run_the_check(norm)


@pytest.mark.parametrize(("norm", "change"), FORWARD, ids=name_of)
def test_a_broken_forward_fails(norm: Norm, change: Callable[..., Any]) -> None:
    def with_residual(f: Any) -> Any:
        """The kernel without a residual, called as if it took one."""

        def forward(x: Tensor, residual: None, *rest: Any) -> Any:
            y, kept = f(x, *rest)
            return y, x.new_empty(0), kept

        return forward

    def without_residual(f: Any, x: Tensor, *rest: Any) -> Any:
        y, _, kept = change(with_residual(f), x, None, *rest)
        return y, kept

    broken = {f"{norm}_forward": without_residual, f"add_{norm}_forward": change}
    name = f"{norm}_{change.__name__}"
    with mutant(name, **broken), pytest.raises(AssertionError):
        run_the_check(norm)


@pytest.mark.parametrize(("norm", "change"), BACKWARD, ids=name_of)
def test_a_broken_backward_fails(norm: Norm, change: Callable[..., Any]) -> None:
    name = f"{norm}_{change.__name__}"
    with mutant(name, **{f"{norm}_backward": change}), pytest.raises(AssertionError):
        run_the_check(norm)
