"""RMSNorm as PyTorch's machinery meets it: autograd, opcheck, torch.compile, torch.func, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effkern
from effkern.nn.functional import rms_norm
from tests.support.backends import Backend


def arguments(requires_grad: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x, r = (torch.randn(3, 2, 7, dtype=dtype) for _ in range(2))
    w = torch.rand(7, dtype=dtype) + 0.5
    return [t.requires_grad_(requires_grad) for t in (x, r, w)]


def test_gradcheck(backend: Backend) -> None:
    x, r, w = (t.to(backend.device) for t in arguments())
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, (7,), b, 1e-3), (x, w))
    assert torch.autograd.gradcheck(lambda a: rms_norm(a, (2, 7), None, 1e-3), (x,))
    assert torch.autograd.gradcheck(
        lambda a, b, c: rms_norm(a, (7,), c, 1e-3, residual=b), (x, r, w)
    )


def test_second_derivatives(backend: Backend) -> None:
    x, r, w = (t.to(backend.device) for t in arguments())
    assert torch.autograd.gradgradcheck(lambda a, b: rms_norm(a, (7,), b, 1e-3), (x, w))
    assert torch.autograd.gradgradcheck(
        lambda a, b, c: rms_norm(a, (7,), c, 1e-3, residual=b), (x, r, w)
    )


def test_public_ops_differentiate_too() -> None:
    x, r, w = arguments()
    ops = torch.ops.effkern
    assert torch.autograd.gradcheck(lambda a, b: ops.rms_norm(a, (7,), b, 1e-3), (x, w))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.rms_norm(a, (7,), b, 1e-3), (x, w))
    assert torch.autograd.gradcheck(
        lambda a, b, c: ops.add_rms_norm(a, b, (7,), c, 1e-3), (x, r, w)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck_kernels(dtype: torch.dtype, overload: str) -> None:
    x, r, w = arguments(requires_grad=False, dtype=dtype)
    forward = getattr(torch.ops.effkern._rms_norm_forward, overload)
    add_forward = getattr(torch.ops.effkern._add_rms_norm_forward, overload)
    backward = getattr(torch.ops.effkern._rms_norm_backward, overload)
    for residual, weight, dims in ((None, None, 1), (r, w, 1), (r, None, 2), (None, w.float(), 1)):
        inner = x
        if residual is None:
            torch.library.opcheck(forward, (x, weight, dims, 1e-5))
            _, rstd = forward(x, weight, dims, 1e-5)
        else:
            torch.library.opcheck(add_forward, (x, residual, weight, dims, 1e-5))
            _, inner, rstd = add_forward(x, residual, weight, dims, 1e-5)
        for wants in ((True, False), (False, weight is not None), (True, weight is not None)):
            torch.library.opcheck(backward, (r, residual, inner, weight, rstd, dims, *wants))
    empty = torch.empty(0, 7, dtype=dtype)
    torch.library.opcheck(forward, (empty, w, 1, 1e-5))
    torch.library.opcheck(add_forward, (x.transpose(0, 1), r.transpose(0, 1), w, 1, 1e-5))


def test_opcheck_public_ops() -> None:
    x, r, w = arguments(dtype=torch.float32)
    torch.library.opcheck(torch.ops.effkern.rms_norm.default, (x, (7,), w, 1e-5))
    torch.library.opcheck(torch.ops.effkern.rms_norm.default, (x, (2, 7)))
    torch.library.opcheck(torch.ops.effkern.add_rms_norm.default, (x, r, (7,), w, None))


def test_a_saved_tensor_changed_in_place_is_noticed() -> None:
    x, r, w = arguments(dtype=torch.float32)
    y, total = rms_norm(x, (7,), w, residual=r)
    with torch.no_grad():
        total += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_saved_without_need() -> None:
    x, _, w = arguments(dtype=torch.float32)
    assert not rms_norm(x.detach(), (7,), w.detach()).requires_grad
    with torch.no_grad():
        assert not rms_norm(x, (7,), w).requires_grad


def losses(function: Any, *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves)
    loss.backward()
    return [loss.detach(), *(t.grad for t in leaves)]


def test_compile(backend: Backend) -> None:
    if backend.slow:
        pytest.skip("the compiled graph calls the same kernel op; interpreting it adds nothing")

    def loss(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        y, total = rms_norm(x, (7,), w, residual=r)
        return (y * y.sin()).sum() + (rms_norm(total, (2, 7)) * y).sum()

    tensors = [t.detach().float().to(backend.device) for t in arguments()]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for mine, eager in zip(losses(compiled, *tensors), losses(loss, *tensors), strict=True):
        torch.testing.assert_close(mine, eager)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), loss(*tensors))


def test_compile_with_a_changing_shape() -> None:
    torch._dynamo.reset()
    module = effkern.nn.RMSNorm(16)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for rows in (3, 5, 8):
        x = torch.randn(rows, 4, 16, requires_grad=True)
        torch.testing.assert_close(compiled(x), module(x))
        compiled(x).sum().backward()


def test_a_compiled_function_follows_the_backend() -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 8)
    called = []
    compiled = torch.compile(
        lambda a: rms_norm(a, (8,)),
        fullgraph=True,
        backend=lambda graph, _: called.append(str(graph.graph)) or graph.forward,
    )
    compiled(x)
    with effkern.use_backend("reference"):
        compiled(x)
    compiled(x)
    assert len(called) == 2
    assert "_rms_norm_forward.default" in called[0]
    assert "_rms_norm_forward.reference" in called[1]


def test_whole_training_step_in_one_graph() -> None:
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this PyTorch cannot trace backward() inside a graph")
    torch._dynamo.reset()
    x, _, w = (t.detach().float() for t in arguments())

    def step(x: Tensor, w: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(rms_norm(x, (7,), w).square().sum(), w)
        return grad

    w.requires_grad_()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, fullgraph=True)
        torch.testing.assert_close(compiled(x, w), step(x, w))


def test_func_transforms() -> None:
    x, r, w = (t.detach() for t in arguments())

    def loss(function: Any) -> Any:
        return lambda a, b: function(a, (7,), b, 1e-3).sin().sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        mine, stock = (transform(loss(f), argnums=(0, 1))(x, w) for f in (rms_norm, F.rms_norm))
        torch.testing.assert_close(mine, stock)
    hessian, stock_hessian = (
        torch.func.jacrev(torch.func.grad(loss(f)))(x, w) for f in (rms_norm, F.rms_norm)
    )
    torch.testing.assert_close(hessian, stock_hessian)
    mine = torch.func.grad(lambda a: rms_norm(a, (7,), w, 1e-3, residual=r)[0].sin().sum())(x)
    stock = torch.func.grad(lambda a: F.rms_norm(a + r, (7,), w, 1e-3).sin().sum())(x)
    torch.testing.assert_close(mine, stock)


def test_vmap() -> None:
    x, r, w = (t.detach() for t in arguments())
    many = torch.rand(3, 7, dtype=w.dtype)

    def of(function: Any, in_dims: tuple[int | None, int | None], *tensors: Tensor) -> Tensor:
        return torch.vmap(lambda a, b: function(a, (7,), b, 1e-3), in_dims=in_dims)(*tensors)

    for in_dims, args in (
        ((0, None), (x, w)),
        ((1, None), (x, w)),
        ((0, 0), (x, many)),
        ((None, 0), (x[0], many)),
    ):
        torch.testing.assert_close(of(rms_norm, in_dims, *args), of(F.rms_norm, in_dims, *args))
    y, total = torch.vmap(lambda a, b: rms_norm(a, (7,), w, residual=b), in_dims=(0, None))(x, r[0])
    torch.testing.assert_close(total, x + r[0])
    torch.testing.assert_close(y, F.rms_norm(x + r[0], (7,), w))
    per_sample = torch.vmap(torch.func.grad(lambda b, a: rms_norm(a, (7,), b).sum()), (None, 0))
    stock = torch.vmap(torch.func.grad(lambda b, a: F.rms_norm(a, (7,), b).sum()), (None, 0))
    torch.testing.assert_close(per_sample(w, x), stock(w, x))


def test_forward_mode() -> None:
    x, _, w = (t.detach() for t in arguments())
    mine, stock = (
        torch.func.jvp(lambda a, f=f: f(a, (7,), w, 1e-3), (x,), (x.sin(),))
        for f in (rms_norm, F.rms_norm)
    )
    torch.testing.assert_close(mine, stock)


def test_public_ops_under_func() -> None:
    x, r, w = (t.detach() for t in arguments())
    loss = lambda f: lambda a: f(a, (7,), w, 1e-3).sin().sum()  # noqa: E731
    mine, stock = (torch.func.grad(loss(f))(x) for f in (torch.ops.effkern.rms_norm, F.rms_norm))
    torch.testing.assert_close(mine, stock)
    mine = torch.vmap(lambda a: torch.ops.effkern.add_rms_norm(a, r[0], (7,), w, 1e-3)[0])(x)
    torch.testing.assert_close(mine, F.rms_norm(x + r[0], (7,), w, 1e-3))


def test_export() -> None:
    module = effkern.nn.RMSNorm(16)
    x = torch.randn(3, 16)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))


def test_autocast_as_torch() -> None:
    """Api.md, "autocast": on the CPU torch computes rms_norm in the dtype it is given."""
    x = torch.randn(4, 16)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert rms_norm(given, (16,)).dtype == F.rms_norm(given, (16,)).dtype
