"""NormSoftmax as PyTorch's machinery meets it: autograd, opcheck, compile, torch.func, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import effkern
from effkern.nn.functional import norm_softmax
from tests.support.backends import Backend
from tests.support.softmaxes import EPS, naive, rows_of_every_branch


def arguments(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """X with rows of every branch, tau and an additive mask, in float64."""
    x = rows_of_every_branch(6, torch.float64, device)
    tau = torch.tensor(1.0, dtype=torch.float64, device=device)
    bias = torch.randn(7, 6, dtype=torch.float64, device=device)
    return x.requires_grad_(), tau.requires_grad_(), bias.requires_grad_()


def with_bias(x: Tensor, tau: Tensor, bias: Tensor) -> Tensor:
    """Of some visible entries, of few and of none."""
    hidden = torch.zeros_like(bias, dtype=torch.bool)
    hidden[0, 1:3], hidden[1], hidden[2, 1:] = True, True, True
    return norm_softmax(x, tau=tau, eps=EPS, mask=torch.where(hidden, float("-inf"), bias))


def test_gradcheck(backend: Backend) -> None:
    x, tau, bias = arguments(backend.device)
    quick = backend.slow
    # A step of 1e-6 stays on its side of eps and of tau.
    check = torch.autograd.gradcheck
    assert check(lambda a, t: norm_softmax(a, tau=t, eps=EPS), (x, tau), fast_mode=quick)
    assert check(with_bias, (x, tau, bias), fast_mode=quick)
    assert check(lambda a, t: norm_softmax(a, 0, tau=t), (x, tau), fast_mode=quick)


def test_second_derivatives(backend: Backend) -> None:
    x, tau, bias = arguments(backend.device)
    check, quick = torch.autograd.gradgradcheck, backend.slow
    assert check(lambda a, t: norm_softmax(a, tau=t, eps=EPS), (x, tau), fast_mode=quick)
    assert check(with_bias, (x, tau, bias), fast_mode=True)


def test_public_op_differentiates_too() -> None:
    x, _, bias = arguments()
    op = torch.ops.effkern.norm_softmax
    assert torch.autograd.gradcheck(lambda a, b: op(a, 1, 1.0, EPS, b), (x, bias))
    torch.library.opcheck(op.default, (x.detach().float(), 0, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck_kernels(dtype: torch.dtype, overload: str) -> None:
    forward, backward = (
        getattr(getattr(torch.ops.effkern, f"_norm_softmax_{kind}"), overload)
        for kind in ("forward", "backward")
    )
    x = torch.randn(3, 4, 5).to(dtype)
    tau, visible = torch.tensor(0.7), torch.rand(4, 1) > 0.4
    for dim, mask, number in (
        (2, None, None),
        (1, visible, None),
        (0, torch.randn(5).to(dtype), tau),
        (2, torch.randn(3, 1, 5), tau),
    ):
        call = x, mask, number, 1.0, 1e-6, dim
        torch.library.opcheck(forward, call)
        for wants in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(backward, (x, *call, *wants))
    torch.library.opcheck(forward, (x.transpose(0, 2)[:0], None, None, 1.0, 1e-6, 1))
    torch.library.opcheck(forward, (x[0, 0, 0], None, None, 1.0, 1e-6, 0))
    torch.library.opcheck(backward, (x[:0], x[:0], None, tau, 1.0, 1e-6, 0, True, True))


def test_a_saved_tensor_changed_in_place_is_noticed() -> None:
    x, *_ = arguments()
    inner = x * 1
    y = norm_softmax(inner)
    with torch.no_grad():
        inner += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_saved_without_need() -> None:
    x, *_ = arguments()
    assert not norm_softmax(x.detach()).requires_grad
    with torch.no_grad():
        assert not norm_softmax(x).requires_grad


def test_compile(backend: Backend) -> None:
    if backend.slow:
        pytest.skip("the compiled graph calls the same kernel op; interpreting it adds nothing")

    def loss(x: Tensor, tau: Tensor, bias: Tensor) -> Tensor:
        y = norm_softmax(x, tau=tau, mask=bias)
        return (y * y.sin()).sum() + (norm_softmax(x, 0, mask=bias > 0) * y).sum()

    torch._dynamo.reset()
    tensors = arguments(backend.device)

    def run(function: Any) -> list[Tensor]:
        leaves = [t.detach().float().requires_grad_() for t in tensors]
        value = function(*leaves)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    # Inductor's own sines are others in the last digit, which small deviations make large.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mine, stock in zip(run(compiled), run(loss), strict=True):
        torch.testing.assert_close(mine, stock)


def test_compile_with_a_changing_shape() -> None:
    torch._dynamo.reset()
    module = effkern.nn.NormSoftmax(-1, tau=torch.nn.Parameter(torch.tensor(0.5)))
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for rows in (3, 5, 8):
        x = torch.randn(rows, 4, 2 * rows, requires_grad=True)
        torch.testing.assert_close(compiled(x), module(x))
        compiled(x).square().sum().backward()


def test_func_transforms() -> None:
    x, tau, bias = (t.detach() for t in arguments())

    def loss(function: Any) -> Any:
        return lambda a: function(a).sin().sum()

    functions = (
        lambda a: norm_softmax(a, tau=1.0, eps=EPS),
        lambda a: naive(a, -1, 1.0, EPS),
    )
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        mine, stock = (transform(loss(f))(x) for f in functions)
        torch.testing.assert_close(mine, stock)
    mine, stock = (torch.func.jvp(f, (x,), (x.sin(),)) for f in functions)
    torch.testing.assert_close(mine, stock)
    mine, stock = (torch.vmap(f, in_dims=1)(x.expand(3, 7, 6)) for f in functions)
    torch.testing.assert_close(mine, stock)
    mapped = torch.vmap(lambda a, b: norm_softmax(a, mask=b, tau=tau), (0, 0))(x, bias > 0)
    torch.testing.assert_close(mapped, norm_softmax(x, mask=bias > 0, tau=tau))


def test_export() -> None:
    module, x = effkern.nn.NormSoftmax(), torch.randn(3, 16)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_as_torch(dtype: torch.dtype) -> None:
    """Api.md, "autocast": in float32 on CUDA, as it is given on the CPU; no GPU is needed."""
    before = torch.is_autocast_enabled("cuda")
    with FakeTensorMode():
        x = torch.empty(4, 16, device="cuda", dtype=dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            assert norm_softmax(x).dtype == torch.softmax(x, -1).dtype
        finally:
            torch.set_autocast_enabled("cuda", before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(4, 16, dtype=dtype)
        assert norm_softmax(x).dtype == torch.softmax(x, -1).dtype
