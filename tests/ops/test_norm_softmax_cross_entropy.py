"""NormSoftmax's cross-entropy on every backend, against torch's own of normalised logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.backends.reference import norm_softmax as reference
from effkern.nn.functional import norm_softmax_cross_entropy
from tests.support.accuracy import assert_as_accurate
from tests.support.backends import Backend
from tests.support.softmaxes import EPS, rows_of_every_branch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def check(
    logits: Tensor, target: Tensor, *, tau: float = 1.0, eps: float = EPS, **options: Any
) -> None:
    """Compare the loss and its gradients with float64, by the rule of agreement.

    Eager PyTorch is its own cross-entropy of the plain formula's logits, in the dtype.
    """
    made = torch.randn(()).item()

    def run(kind: str) -> list[Tensor]:
        wide = kind == "exact"
        dtype = torch.float64 if wide else logits.dtype
        x = logits.detach().to(dtype, copy=True).requires_grad_()
        t = torch.tensor(tau, device=x.device, dtype=torch.float64 if wide else torch.float32)
        t.requires_grad_()
        if kind == "actual":
            given = x * 1 if options.get("inplace") else x
            loss = norm_softmax_cross_entropy(given, target, tau=t, eps=eps, **options)
        else:
            rest = {k: v for k, v in options.items() if k != "inplace"}
            for name in ("weight", "target"):
                if isinstance(rest.get(name), Tensor):
                    rest[name] = rest[name].to(dtype)
            row = reference.centred(x, None, min(1, x.dim() - 1))
            z = row.values / reference.divisor(row.variance, row.entries, t, eps)
            of = target.to(z.dtype) if target.is_floating_point() else target
            if rest.get("weight") is not None:
                rest["weight"] = rest["weight"].to(z.dtype)
            loss = F.cross_entropy(z, of, **rest).to(dtype)
        scale = torch.linspace(0.5, 1.5, loss.numel(), device=x.device).view(loss.shape) + made
        (loss * scale.to(loss.dtype)).sum().backward()
        return [loss.detach(), x.grad, t.grad]

    actual, stock, exact = run("actual"), run("eager"), run("exact")
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    few = 16 * torch.finfo(wide).eps
    row = reference.centred(logits.double(), None, min(1, logits.dim() - 1))
    least = reference.divisor(row.variance, row.entries, tau, eps).min().item()
    # A few roundings of the terms that cancel: dz / divisor, and z in the loss and in tau's.
    rows = logits.numel() // logits.shape[min(1, logits.dim() - 1)]
    biggest = row.values.abs().max().item()
    weight = options.get("weight")
    most = 1.0 if weight is None else max(weight.max().item(), 1.0)
    counted = 1 if options.get("reduction") in ("sum", "none") else rows
    of_rows = few * 3 * most
    slack = (of_rows * biggest / tau / counted, of_rows / least / counted)
    for what, mine, theirs, wanted, atol in zip(
        ("loss", "grad_logits", "grad_tau"),
        actual,
        stock,
        exact,
        (*slack, of_rows * rows * biggest / tau**2 / counted),
        strict=True,
    ):
        assert_as_accurate(mine, theirs, wanted, atol=atol, what=what)


def indices(rows: int, classes: int, device: str) -> Tensor:
    """Some of them are to be ignored."""
    target = torch.randint(classes, (rows,))
    target[-2] = -100
    return target.to(device)


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"reduction": "sum"},
    {"reduction": "none", "label_smoothing": 0.2},
    {"inplace": True},
    {"inplace": True, "reduction": "sum", "label_smoothing": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_class_indices(backend: Backend, weighted: bool, options: dict[str, Any]) -> None:
    if backend.slow and options.get("reduction") == "sum":
        return
    for classes in (33,) if backend.slow else (33, 96):
        x = rows_of_every_branch(classes, device=backend.device)
        weight = torch.rand(classes, device=backend.device) + 0.2 if weighted else None
        check(x, indices(len(x), classes, backend.device), weight=weight, **options)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_probabilities(backend: Backend, weighted: bool, options: dict[str, Any]) -> None:
    x = rows_of_every_branch(40, device=backend.device)
    weight = torch.rand(40, device=backend.device) + 0.2 if weighted else None
    if backend.slow and not options:
        return
    target = torch.rand(x.shape, device=backend.device)  # they need not sum to one
    check(x, target / target.sum(1, keepdim=True), weight=weight, **options)
    check(x, target / 20, weight=weight, **options)


@dtypes
def test_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    x = rows_of_every_branch(50, dtype, backend.device)
    target = indices(len(x), 50, backend.device)
    check(x, target, label_smoothing=0.1)
    check(x, target, inplace=True, weight=torch.rand(50, device=backend.device).to(dtype))
    check(x, torch.softmax(torch.randn(x.shape, device=backend.device), 1).to(dtype))


@pytest.mark.parametrize("classes", [1, 2, 8193, 50257])
def test_numbers_of_classes(backend: Backend, classes: int) -> None:
    if backend.slow and classes > 10000:
        return
    x = torch.randn(3, classes, device=backend.device) * torch.tensor([[0.3], [1.1], [5.0]]).to(
        backend.device
    )
    check(x, torch.tensor([0, classes - 1, classes // 2], device=backend.device))


def test_further_dimensions(backend: Backend) -> None:
    x = torch.randn(2, 7, 3, 4, device=backend.device)
    target = torch.randint(7, (2, 3, 4), device=backend.device)
    for reduction in ("mean", "none"):
        check(x, target, reduction=reduction, label_smoothing=0.1)
        check(x, torch.softmax(torch.randn_like(x), 1), reduction=reduction)
        check(x[0, :, 0, 0], target[0, 0, 0], reduction=reduction)
    strided = torch.randn(6, 5, device=backend.device).t()
    check(strided, torch.tensor([0, 1, 2, 3, 5], device=backend.device))


@pytest.mark.parametrize("magnitude", [1e-6, 1e4])
def test_magnitudes(backend: Backend, magnitude: float) -> None:
    x = torch.randn(6, 40, device=backend.device) * magnitude
    check(x, indices(6, 40, backend.device))
    check(x + 1e4, x.argmax(1))


def test_all_ignored_as_torch(backend: Backend) -> None:
    x = torch.randn(3, 5, device=backend.device, requires_grad=True)
    target = torch.full((3,), -100, device=backend.device)
    for reduction in ("mean", "sum", "none"):
        loss = norm_softmax_cross_entropy(x, target, reduction=reduction)
        expected = F.cross_entropy(x, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert not grad.any()


def test_the_logits_are_kept_or_overwritten(backend: Backend) -> None:
    leaf = torch.randn(4, 9, device=backend.device, requires_grad=True)
    target = torch.tensor([1, 2, 3, 8], device=backend.device)
    found = []
    for inplace in (False, True):
        logits = leaf * 1
        before = logits.detach().clone()
        loss = norm_softmax_cross_entropy(logits, target, inplace=inplace)
        assert torch.equal(logits, before) is not inplace
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*found)
    with torch.no_grad():
        logits = leaf * 1
        norm_softmax_cross_entropy(logits, target, inplace=True)
        assert torch.equal(logits, leaf)


def test_several_backward_passes(backend: Backend) -> None:
    x = torch.randn(4, 9, device=backend.device, requires_grad=True)
    target = torch.tensor([1, 2, 3, 8], device=backend.device)
    for reduction in ("mean", "sum"):
        loss = norm_softmax_cross_entropy(x, target, reduction=reduction)
        (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
        x.grad = None
        for count in (1, 2, 3):
            loss.backward(retain_graph=True)
            torch.testing.assert_close(x.grad, count * expected)
        (scaled,) = torch.autograd.grad(3 * loss, x)
        torch.testing.assert_close(scaled, 3 * expected)
    loss = norm_softmax_cross_entropy(x * 1, target, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_derivatives(backend: Backend) -> None:
    x = rows_of_every_branch(5, torch.float64, backend.device).requires_grad_()
    tau = torch.tensor(1.0, dtype=torch.float64, device=backend.device, requires_grad=True)
    target = indices(len(x), 5, backend.device)

    def loss(a: Tensor, t: Tensor) -> Tensor:
        return norm_softmax_cross_entropy(a, target, tau=t, eps=EPS, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, (x, tau), fast_mode=backend.slow)
    assert torch.autograd.gradgradcheck(loss, (x, tau), fast_mode=True)


def test_results_are_reproducible(backend: Backend) -> None:
    """Bit for bit, whatever the number of threads."""
    x = torch.randn(40 if backend.slow else 600, 129, device=backend.device)
    target = indices(len(x), 129, backend.device)

    def run() -> list[Tensor]:
        a = x.clone().requires_grad_()
        loss = norm_softmax_cross_entropy(a, target)
        return [loss.detach(), *torch.autograd.grad(loss, a)]

    threads, first = torch.get_num_threads(), run()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, first, run()))
    finally:
        torch.set_num_threads(threads)
