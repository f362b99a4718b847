"""Clipping by the norm of all gradients: inside the step, and as a function."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import effkern
from tests.support.backends import Backend
from tests.support.twins import TWIN, Twins

KINDS = pytest.mark.parametrize("kind", TWIN, ids=lambda k: k.__name__)


def some_params(device: str) -> list[Tensor]:
    return [torch.randn(s, device=device) for s in ((4, 3), (), (300,), (0, 2))]


@KINDS
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_a_step_clips_as_torch_does_before_it(
    backend: Backend, kind: type[Optimizer], max_norm: float
) -> None:
    twins = Twins(some_params(backend.device), kind, lr=0.05)
    twins.optimizer.max_grad_norm = max_norm
    for _ in range(2):
        twins.new_grads()
        grads = [p.grad.clone() for p in twins.mine]
        norm = torch.nn.utils.clip_grad_norm_(twins.theirs, max_norm)
        twins.both(lambda optimizer: optimizer.step())
        twins.check()
        assert all(torch.equal(p.grad, g) for p, g in zip(twins.mine, grads, strict=True))
        found = twins.optimizer.last_grad_norm
        assert found.shape == ()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), norm)


def test_the_norm_is_of_all_groups_and_dtypes(backend: Backend) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)
    groups = [
        {"params": [torch.randn(9, dtype=d, device=backend.device)], "lr": 0.01 * (i + 1)}
        for i, d in enumerate(dtypes)
    ]
    twins = Twins(groups, effkern.FusedAdamW)
    twins.optimizer.max_grad_norm = 1.0
    for _ in range(2):
        twins.new_grads()
        norm = torch.nn.utils.clip_grad_norm_(twins.theirs, 1.0)
        twins.both(lambda optimizer: optimizer.step())
        twins.check()
        assert twins.optimizer.last_grad_norm.dtype == torch.float64
        torch.testing.assert_close(twins.optimizer.last_grad_norm.cpu(), norm)


def test_the_norm_of_no_gradients() -> None:
    """As torch's function has it, not that of an earlier step."""
    optimizer = effkern.FusedAdamW([torch.zeros(3)], max_grad_norm=1.0)
    (param,) = optimizer.param_groups[0]["params"]
    for grad in (None, torch.ones(3), None):
        param.grad = grad
        optimizer.step()
        norm = optimizer.last_grad_norm
        assert norm.shape == ()
        assert norm == torch.nn.utils.get_total_norm([] if grad is None else [grad])


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_with_a_gradient_scale(backend: Backend, scale: float) -> None:
    """The norm that counts is that of the gradients without their scale."""
    twins = Twins(some_params(backend.device), lr=0.05)
    twins.optimizer.max_grad_norm = 0.7
    twins.new_grads()
    for p in twins.mine:
        p.grad = p.grad * scale
    norm = torch.nn.utils.clip_grad_norm_(twins.theirs, 0.7)
    twins.optimizer.grad_scale = torch.tensor(scale, device=backend.device)
    twins.optimizer.step()
    del twins.optimizer.grad_scale
    twins.twin.step()
    twins.check()
    torch.testing.assert_close(twins.optimizer.last_grad_norm.cpu().double(), norm)


def test_a_nan_spoils_all_as_in_torch(backend: Backend) -> None:
    params = [torch.nn.Parameter(p) for p in some_params(backend.device)]
    optimizer = effkern.FusedSGD(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad.fill_(float("nan"))
    optimizer.step()
    assert optimizer.last_grad_norm.isnan()
    assert all(p.isnan().all() for p in params)


def test_the_norm_does_not_depend_on_threads() -> None:
    params = [torch.nn.Parameter(torch.randn(70001)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            optimizer = effkern.FusedSGD(params, lr=0.0, max_grad_norm=1.0)
            optimizer.step()
            found.append(optimizer.last_grad_norm.item())
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_clip_too(way: Any) -> None:
    optimizer = effkern.FusedAdam([torch.nn.Parameter(torch.zeros(3))], max_grad_norm=0.5)
    other = way(optimizer)
    assert other.max_grad_norm == 0.5
    (param,) = other.param_groups[0]["params"]
    param.grad = torch.full((3,), 2.0)
    other.step()
    assert other.last_grad_norm.item() == pytest.approx(12**0.5)


def test_arguments() -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="Invalid max_grad_norm value"):
            effkern.FusedAdam([torch.zeros(1)], max_grad_norm=wrong)
    optimizer = effkern.FusedAdam([torch.zeros(1)])
    with pytest.raises(AttributeError, match="after a step with max_grad_norm"):
        _ = optimizer.last_grad_norm
    assert not hasattr(optimizer, "last_grad_norm")


GRADS: dict[str, Any] = {
    "plain": lambda: [torch.randn(4, 3), torch.randn(()), torch.randn(300), torch.randn(0)],
    "dtypes": lambda: [
        torch.randn(9, dtype=d)
        for d in (torch.float32, torch.bfloat16, torch.float64, torch.complex64)
    ],
    "layouts": lambda: [
        torch.randn(4, 6).t(),
        torch.randn(6, 8)[::2, ::2],
        torch.randn(5).conj(),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex64).conj().imag,
    ],
    "some without": lambda: [torch.randn(3), None, torch.randn(2)],
    "none": lambda: [None],
}


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("case", GRADS)
def test_the_function(case: str, norm_type: float, max_norm: float) -> None:
    grads = GRADS[case]()
    mine, theirs = [], []
    for grad in grads:
        for one in (mine, theirs):
            like = torch.zeros(3) if grad is None else grad
            one.append(torch.nn.Parameter(torch.zeros_like(like)))
            one[-1].grad = None if grad is None else grad.clone()
    if norm_type == float("inf"):  # of nothing there is none
        mine, theirs = ([p for p in one if p.numel()] for one in (mine, theirs))
    for p in theirs if norm_type == 2.0 else []:  # torch rounds the norm of each bfloat16 tensor
        wide = torch.complex128 if p.is_complex() else torch.float64
        p.data = p.data.to(wide)
        p.grad = None if p.grad is None else p.grad.to(wide)
    found = effkern.clip_grad_norm_(mine, max_norm, norm_type)
    right = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    torch.testing.assert_close(found, right, check_dtype=False, rtol=1e-6, atol=1e-7)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a.grad.to(b.dtype), b.grad, rtol=4 * eps, atol=1e-7)
    if any(g is not None for g in grads) and norm_type == 2.0:
        wide = any(g is not None and g.dtype == torch.float64 for g in grads)
        assert found.dtype == (torch.float64 if wide else torch.float32)


def test_the_function_takes_one_tensor_and_generators() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.full((3,), 2.0)
    assert effkern.clip_grad_norm_(p, 1.0).item() == pytest.approx(12**0.5)
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    effkern.clip_grad_norm_((q for q in [p]), 0.5)
    assert p.grad.norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_function_on_norms_that_are_not_finite(value: float) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, value, 2.0])
    with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
        effkern.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    right = torch.nn.Parameter(torch.zeros(3))
    right.grad = p.grad.clone()
    effkern.clip_grad_norm_(p, 1.0)
    torch.nn.utils.clip_grad_norm_(right, 1.0)
    torch.testing.assert_close(p.grad, right.grad, equal_nan=True)


def test_the_function_in_one_graph() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.complex64)
    mine, theirs = ([torch.nn.Parameter(torch.zeros(6, dtype=d)) for d in dtypes] for _ in range(2))
    clip = torch.compile(effkern.clip_grad_norm_, fullgraph=True, backend="aot_eager")
    for max_norm in (0.5, 1e6):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        assert torch.equal(clip(mine, max_norm), effkern.clip_grad_norm_(theirs, max_norm))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))
