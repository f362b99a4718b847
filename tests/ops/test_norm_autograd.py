"""The norms as PyTorch's machinery meets them: autograd, opcheck, compile, torch.func, export."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import effkern
from effkern.nn.functional import rms_norm
from tests.support.backends import Backend
from tests.support.norms import CRMS, LAYER, RMS, Norm, every_norm


def arguments(
    norm: Norm, requires_grad: bool = True, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[Tensor]:
    """X, a residual, and parameters of the last dimension."""
    x, r = (torch.randn(3, 2, 7, dtype=dtype, device=device) for _ in range(2))
    tensors = [x, r, *norm.random_parameters((7,), dtype=dtype, device=device)]
    return [t.requires_grad_(requires_grad) for t in tensors]


def public_arguments(norm: Norm, **options: Any) -> list[Tensor]:
    """As `arguments`, with those parameters alone that the public function takes."""
    return arguments(norm, **options)[: 2 + norm.public_parameters]


def plain(norm: Norm) -> Any:
    """A function of x and the parameters."""
    return lambda x, *parameters: norm(x, *parameters, eps=1e-3)


def with_residual(norm: Norm) -> Any:
    """A function of x, a residual and the parameters, with two results."""
    return lambda x, r, *parameters: norm(x, *parameters, eps=1e-3, residual=r)


def eager(norm: Norm) -> Any:
    """What `plain` is, in stock PyTorch."""
    return lambda x, *parameters: norm.eager(x, 1, [*parameters, None][:2], 1e-3)


def is_quick(backend: Backend, norm: Norm) -> bool:
    """Whether one random direction will do for finite differences: where kernels are interpreted,
    of all norms but RMSNorm.
    """
    return backend.slow and norm is not RMS


@every_norm
def test_gradcheck(backend: Backend, norm: Norm) -> None:
    x, r, *parameters = arguments(norm, device=backend.device)
    check = partial(torch.autograd.gradcheck, fast_mode=is_quick(backend, norm))
    assert check(plain(norm), (x, *parameters))
    assert check(with_residual(norm), (x, r, *parameters))
    if norm.many_dims:
        assert check(lambda a: norm(a, dims=2, eps=1e-3), (x,))


@every_norm
def test_second_derivatives(backend: Backend, norm: Norm) -> None:
    x, r, *parameters = arguments(norm, device=backend.device)
    check = partial(torch.autograd.gradgradcheck, fast_mode=is_quick(backend, norm))
    assert check(plain(norm), (x, *parameters))
    assert check(with_residual(norm), (x, r, *parameters))


def public(norm: Norm, add: bool = False) -> Any:
    """The public op as `plain` is, or as `with_residual`."""
    op = getattr(torch.ops.effkern, f"add_{norm.name}" if add else norm.name)
    shape = [(7,)] if norm.many_dims else []
    if add:
        return lambda x, r, *parameters: op(x, r, *shape, *parameters, 1e-3)
    return lambda x, *parameters: op(x, *shape, *parameters, 1e-3)


@every_norm
def test_public_ops_differentiate_too(norm: Norm) -> None:
    x, r, *parameters = public_arguments(norm)
    assert torch.autograd.gradcheck(public(norm), (x, *parameters))
    assert torch.autograd.gradgradcheck(public(norm), (x, *parameters))
    assert torch.autograd.gradcheck(public(norm, add=True), (x, r, *parameters))


# The overloads share one fake. Of bfloat16 the statistics and a weight may have another dtype.
@pytest.mark.parametrize(
    ("overload", "dtype"),
    [("default", torch.float32), ("default", torch.bfloat16), ("reference", torch.bfloat16)],
    ids=str,
)
@every_norm
def test_opcheck_kernels(norm: Norm, overload: str, dtype: torch.dtype) -> None:
    x, r, *parameters = arguments(norm, requires_grad=False, dtype=dtype)
    forward, add_forward, backward, inference = (
        norm.op(kind, overload) for kind in ("forward", "add_forward", "backward", "inference")
    )
    none, wide = [None] * len(parameters), [p.float() for p in parameters]
    many = 2 if norm.many_dims else 1
    for residual, given, dims in (
        (None, none, 1),
        (r, parameters, 1),
        (r, none, many),
        (None, wide, 1),
    ):
        inner = x
        if residual is None:
            torch.library.opcheck(forward, (x, *given, dims, 1e-5))
            torch.library.opcheck(inference, (x, *given, dims, 1e-5))
            _, kept = forward(x, *given, dims, 1e-5)
        else:
            torch.library.opcheck(add_forward, (x, residual, *given, dims, 1e-5))
            _, inner, kept = add_forward(x, residual, *given, dims, 1e-5)
        there = given[0] is not None
        wanted = [(True, *[False] * len(given)), (False, *[there] * len(given))]
        wanted += [(True, there, *[False] * (len(given) - 1)), (True, *[there] * len(given))]
        for wants in dict.fromkeys(wanted):
            torch.library.opcheck(backward, (r, residual, inner, given[0], kept, dims, *wants))
    empty = torch.empty(0, 7, dtype=dtype)
    torch.library.opcheck(forward, (empty, *parameters, 1, 1e-5))
    swapped = x.transpose(0, 1), r.transpose(0, 1)
    torch.library.opcheck(add_forward, (*swapped, *parameters, 1, 1e-5))


@every_norm
def test_opcheck_public_ops(norm: Norm) -> None:
    x, r, *parameters = public_arguments(norm, dtype=torch.float32)
    op, add = (getattr(torch.ops.effkern, name).default for name in (norm.name, f"add_{norm.name}"))
    shape = [(7,)] if norm.many_dims else []
    torch.library.opcheck(op, (x, *shape, *parameters, 1e-5))
    torch.library.opcheck(add, (x, r, *shape, *parameters, 1e-5))
    if norm.many_dims:
        torch.library.opcheck(op, (x, (2, 7)))


@every_norm
def test_a_saved_tensor_changed_in_place_is_noticed(norm: Norm) -> None:
    x, r, *parameters = arguments(norm, dtype=torch.float32)
    y, total = norm(x, *parameters, residual=r)
    with torch.no_grad():
        total += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_norm
def test_nothing_is_saved_without_need(norm: Norm) -> None:
    x, _, *parameters = arguments(norm, dtype=torch.float32)
    assert not norm(x.detach(), *(p.detach() for p in parameters)).requires_grad
    with torch.no_grad():
        assert not norm(x, *parameters).requires_grad


def losses(function: Any, *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves)
    loss.backward()
    return [loss.detach(), *(t.grad for t in leaves)]


@every_norm
def test_compile(backend: Backend, norm: Norm) -> None:
    if backend.slow:
        pytest.skip("the compiled graph calls the same kernel op; interpreting it adds nothing")

    def loss(x: Tensor, r: Tensor, *parameters: Tensor) -> Tensor:
        y, total = norm(x, *parameters, residual=r)
        return (y * y.sin()).sum() + (norm(total, dims=2 if norm.many_dims else 1) * y).sum()

    tensors = [t.detach().float() for t in arguments(norm, device=backend.device)]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for mine, stock in zip(losses(compiled, *tensors), losses(loss, *tensors), strict=True):
        torch.testing.assert_close(mine, stock)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), loss(*tensors))


def module_of(norm: Norm) -> torch.nn.Module:
    """For 16 features."""
    if norm is CRMS:
        return effkern.nn.CRMSNorm(17, elementwise_affine=True)
    return effkern.nn.RMSNorm(16) if norm is RMS else effkern.nn.LayerNorm(16)


@every_norm
def test_compile_with_a_changing_shape(norm: Norm) -> None:
    torch._dynamo.reset()
    module = module_of(norm)
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
    assert "_rms_norm_inference.default" in called[0]
    assert "_rms_norm_inference.reference" in called[1]


@every_norm
def test_whole_training_step_in_one_graph(norm: Norm) -> None:
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this PyTorch cannot trace backward() inside a graph")
    torch._dynamo.reset()
    x, _, *parameters = (t.detach().float() for t in arguments(norm))

    def step(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(norm(x, *parameters).square().sum(), parameters)

    for parameter in parameters:
        parameter.requires_grad_()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, fullgraph=True)
        torch.testing.assert_close(compiled(x, *parameters), step(x, *parameters))


@every_norm
def test_func_transforms(norm: Norm) -> None:
    x, r, *parameters = (t.detach() for t in arguments(norm))
    numbers = tuple(range(1 + len(parameters)))

    def loss(function: Any) -> Any:
        return lambda *tensors: function(*tensors).sin().sum()

    functions = (plain(norm), eager(norm))
    for transform in (torch.func.grad, torch.func.jacrev):
        mine, stock = (transform(loss(f), argnums=numbers)(x, *parameters) for f in functions)
        torch.testing.assert_close(mine, stock)
    hessian, stock_hessian = (
        torch.func.jacrev(torch.func.grad(loss(f)))(x, *parameters) for f in functions
    )
    torch.testing.assert_close(hessian, stock_hessian)
    mine = torch.func.grad(lambda a: with_residual(norm)(a, r, *parameters)[0].sin().sum())(x)
    stock = torch.func.grad(lambda a: eager(norm)(a + r, *parameters).sin().sum())(x)
    torch.testing.assert_close(mine, stock)


@every_norm
def test_vmap(norm: Norm) -> None:
    x, r, *parameters = (t.detach() for t in arguments(norm))
    many = [torch.stack([p, p + 1, p - 1]) for p in parameters]
    none, all_ = [None] * len(parameters), [0] * len(parameters)
    for in_dims, args in (
        ((0, *none), (x, *parameters)),
        ((1, *none), (x, *parameters)),
        ((0, *all_), (x, *many)),
        ((None, *all_), (x[0], *many)),
    ):
        mine, stock = (torch.vmap(f, in_dims=in_dims)(*args) for f in (plain(norm), eager(norm)))
        torch.testing.assert_close(mine, stock)
    y, total = torch.vmap(lambda a, b: norm(a, *parameters, residual=b), in_dims=(0, None))(x, r[0])
    torch.testing.assert_close(total, x + r[0])
    torch.testing.assert_close(y, norm.eager(x + r[0], 1, parameters, 1e-5))

    def per_sample(function: Any) -> Tensor:
        gradient = torch.func.grad(lambda b, a: function(a, b, *parameters[1:]).sum())
        return torch.vmap(gradient, (None, 0))(parameters[0], x)

    torch.testing.assert_close(per_sample(plain(norm)), per_sample(eager(norm)))


@every_norm
def test_forward_mode(norm: Norm) -> None:
    x, _, *parameters = (t.detach() for t in arguments(norm))
    mine, stock = (
        torch.func.jvp(lambda a, f=f: f(a, *parameters), (x,), (x.sin(),))
        for f in (plain(norm), eager(norm))
    )
    torch.testing.assert_close(mine, stock)


@every_norm
def test_public_ops_under_func(norm: Norm) -> None:
    x, r, *parameters = (t.detach() for t in public_arguments(norm))
    loss = lambda f: lambda a: f(a, *parameters).sin().sum()  # noqa: E731
    mine, stock = (torch.func.grad(loss(f))(x) for f in (public(norm), eager(norm)))
    torch.testing.assert_close(mine, stock)
    mine = torch.vmap(lambda a: public(norm, add=True)(a, r[0], *parameters)[0])(x)
    torch.testing.assert_close(mine, eager(norm)(x + r[0], *parameters))


@every_norm
def test_export(norm: Norm) -> None:
    module, x = module_of(norm), torch.randn(3, 16)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.parametrize("norm", [RMS, LAYER], ids=str)
def test_autocast_as_torch(norm: Norm) -> None:
    """Api.md, "autocast": on the CPU torch computes both in the dtype it is given."""
    x = torch.randn(4, 16)
    none = [None] * norm.parameters
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert norm(given).dtype == norm.eager(given, 1, none, 1e-5).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_norm
def test_autocast_on_cuda_as_torch(norm: Norm, dtype: torch.dtype) -> None:
    """Asked of tensors without memory, no GPU is needed. LayerNorm is computed in float32, but for
    float64; RMSNorm in what this version of PyTorch computes its own in.
    """
    twin = RMS if norm is CRMS else norm
    before = torch.is_autocast_enabled("cuda")
    with FakeTensorMode():
        x = torch.empty(4, 16, device="cuda", dtype=dtype)
        count = norm.public_parameters
        parameters = [torch.empty(16, device="cuda", dtype=dtype) for _ in range(count)]
        torch.set_autocast_enabled("cuda", True)
        try:
            y, total = norm(x, *parameters, residual=x)
            stock = twin.eager(x, 1, [*parameters, None][:2], 1e-5)
        finally:
            torch.set_autocast_enabled("cuda", before)
    assert y.dtype == total.dtype == stock.dtype
    if norm is LAYER:
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
