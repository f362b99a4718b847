"""NormSoftmax's cross-entropy as PyTorch's machinery meets it, what it refuses, and mutants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern.nn.functional import norm_softmax_cross_entropy
from tests.ops.test_norm_softmax_cross_entropy import check, indices
from tests.support.backends import Backend
from tests.support.mutants import mutant
from tests.support.softmaxes import rows_of_every_branch

X, TARGET = torch.randn(4, 8), torch.tensor([0, 7, 3, 2])


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload: str) -> None:
    op = getattr(torch.ops.effkern._norm_softmax_cross_entropy, overload)
    in_place = getattr(torch.ops.effkern._norm_softmax_cross_entropy_, overload)
    numbers, one = (1.0, 1e-6, 0.1, -100), torch.ones(())
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = X.to(dtype), torch.rand(8)
        for target in (TARGET, torch.rand(4, 8)):
            torch.library.opcheck(op, (x, target, None, None, *numbers, None, False, False))
            torch.library.opcheck(op, (x, target, weight, one, *numbers, torch.ones(4), True, True))
        call = x.clone(), TARGET, weight, None, *numbers, one, True
        torch.library.opcheck(in_place, call)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(backend: Backend, reduction: str) -> None:
    if backend.slow:
        pytest.skip("the compiled graph calls the same kernel op; interpreting it adds nothing")
    x, target = rows_of_every_branch(9, device=backend.device), indices(7, 9, backend.device)

    def loss(a: Tensor, tau: Tensor) -> Tensor:
        options = {"reduction": reduction, "inplace": reduction == "mean"}
        return norm_softmax_cross_entropy(a * 1, target, tau=tau, **options).sin().sum()

    def run(function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, torch.ones((), device=backend.device))]
        value = function(*leaves)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(loss))


def test_func_transforms() -> None:
    def loss(a: Tensor, target: Tensor = TARGET) -> Tensor:
        return norm_softmax_cross_entropy(a, target)

    expected = torch.autograd.functional.hessian(loss, X)
    torch.testing.assert_close(torch.func.hessian(loss)(X), expected)
    mapped = torch.vmap(loss)(X.expand(3, 4, 8), TARGET.expand(3, 4))
    torch.testing.assert_close(mapped, loss(X).expand(3))


def test_an_index_out_of_range(backend: Backend) -> None:
    """Raises on the CPU; elsewhere the loss of that row alone is NaN."""
    target = torch.tensor([0, 8, 3, -1], device=backend.device)

    def losses() -> Tensor:
        return norm_softmax_cross_entropy(X.to(backend.device), target, reduction="none")

    if backend.name == "reference" or backend.name.startswith("cpu"):
        with pytest.raises((RuntimeError, IndexError), match=r"target is 8|out of bounds|index 8"):
            losses()
    else:
        assert losses().isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ((X.int(), TARGET), RuntimeError, "logits must be float32.*int32"),
        ((X[0, 0], TARGET), RuntimeError, "logits must have a dimension of classes"),
        ((X, [0, 1, 2, 3]), TypeError, "target must be a tensor, got list"),
        ((X, TARGET.int()), RuntimeError, "target must be class indices of int64 or uint8 .*int32"),
        ((X[:, :0], TARGET), RuntimeError, r"logits must have a class, got shape \(4, 0\)"),
        ((X, TARGET[:3]), RuntimeError, r"a target of class indices must have shape \(4,\)"),
        ((X, X[:3]), RuntimeError, r"a target of probabilities must have shape \(4, 8\)"),
        ((X, TARGET.to("meta")), RuntimeError, "target must be on logits' device cpu, got meta"),
    ],
)
def test_bad_tensors(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^norm_softmax_cross_entropy: {message}"):
        norm_softmax_cross_entropy(*call)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"weight": torch.ones(7)}, RuntimeError, r"weight must have shape \(8,\), got \(7,\)"),
        ({"tau": 0}, ValueError, "tau must be above 0, got 0"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got NoneType"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of .*got 'avg'"),
        ({"inplace": True, "reduction": "none"}, ValueError, "with inplace=True reduction must be"),
    ],
)
def test_bad_options(options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^norm_softmax_cross_entropy: {message}"):
        norm_softmax_cross_entropy(X, TARGET, **options)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_probabilities_beside_an_ignored_class(needs_grad: bool) -> None:
    """As PyTorch has it, whichever way the call takes."""
    probabilities = torch.softmax(X, 1).requires_grad_(needs_grad)
    with pytest.raises(RuntimeError, match="ignore_index is not supported"):
        norm_softmax_cross_entropy(X, probabilities, ignore_index=0)


def test_indices_in_a_byte(backend: Backend) -> None:
    x, target = X.to(backend.device), TARGET.to(backend.device)
    loss = norm_softmax_cross_entropy(x, target.byte())
    assert torch.equal(loss, norm_softmax_cross_entropy(x, target))


def test_a_scaled_loss_keeps_small_gradients(backend: Backend) -> None:
    """A mean's gradients leave float16's range unless the loss's scale comes first, as GradScaler
    wants it.
    """
    x = torch.randn(512, 400, device=backend.device).half().requires_grad_()
    target, scale = torch.randint(0, 400, (512,), device=backend.device), 2.0**14
    wide = x.detach().double().requires_grad_()
    (norm_softmax_cross_entropy(x, target).float() * scale).backward()
    norm_softmax_cross_entropy(wide, target).backward()
    assert x.grad is not None
    assert wide.grad is not None
    found = x.grad.double() / scale
    assert (found - wide.grad).norm() <= 1e-3 * wide.grad.norm()
    assert (found == 0).sum() == 0


def test_a_leaf_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match="logits must be no leaf that requires a gradient"):
        norm_softmax_cross_entropy(X.clone().requires_grad_(), TARGET, inplace=True)


# What is done to the kernel: f(logits, target, weight, tau, value, eps, smoothing, ignore, scale,
# wants_logits, wants_tau) -> loss, grad, shares.


def without_normalisation(f: Any, *call: Any) -> Any:
    return f(*call[:3], torch.tensor(1.0), 1.0, 1.0, *call[6:])


def ignores_smoothing(f: Any, *call: Any) -> Any:
    return f(*call[:6], 0.0, *call[7:])


def ignores_weight(f: Any, *call: Any) -> Any:
    return f(*call[:2], None, *call[3:])


def counts_ignored_rows(f: Any, logits: Tensor, target: Tensor, *rest: Any) -> Any:
    return f(logits, target.clamp(min=0), *rest)


def misses_the_target(f: Any, logits: Tensor, target: Tensor, *rest: Any) -> Any:
    loss, grad, shares = f(logits, target, *rest)
    return (
        loss,
        grad.scatter_add(1, target.clamp(min=0)[:, None], grad.new_ones(len(grad), 1)),
        shares,
    )


def misses_the_scale(f: Any, *call: Any) -> Any:
    return f(*call[:8], None if call[8] is None else torch.ones_like(call[8]), *call[9:])


def drops_the_last_class(f: Any, *call: Any) -> Any:
    loss, grad, shares = f(*call)
    grad[..., -1:] = 0
    return loss, grad, shares


def run_the_check() -> None:
    x = rows_of_every_branch(24)
    check(x, indices(7, 24, "cpu"), weight=torch.rand(24) + 0.2, label_smoothing=0.2)


def test_the_reference_passes() -> None:
    with mutant("sound_cross_entropy"):
        run_the_check()


@pytest.mark.parametrize(
    "change",
    [
        without_normalisation,
        ignores_smoothing,
        ignores_weight,
        counts_ignored_rows,
        misses_the_target,
        misses_the_scale,
        drops_the_last_class,
    ],
    ids=lambda f: f.__name__,
)
def test_a_broken_kernel_fails(change: Callable[..., Any]) -> None:
    broken = {"norm_softmax_cross_entropy": change}
    with mutant(f"cross_entropy_{change.__name__}", **broken), pytest.raises(AssertionError):
        run_the_check()
