"""NormSoftmax attention as PyTorch's machinery meets it: autograd, opcheck, compile, torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import effkern
from effkern.nn.functional import norm_softmax_attention
from tests.support.backends import Backend
from tests.support.norm_attention import (
    _only_backends_with_a_kernel,  # noqa: F401
    attention,
    way,  # noqa: F401
)

KINDS = ["none", "causal", "padding", "any"]
kinds = pytest.mark.parametrize("kind", KINDS)


def keywords(kind: str, rows: int = 9, device: str = "cpu") -> dict[str, Any]:
    if kind == "causal":
        return {"is_causal": True}
    if kind == "none":
        return {}
    mask = torch.ones(2, 1, 1 if kind == "padding" else rows, 9, dtype=torch.bool, device=device)
    mask[0, ..., 6:] = False
    mask[1, ..., :2] = False
    if kind == "any":
        mask[0, 0, 3, 2:5] = False
    return {"attn_mask": mask}


def tensors(
    dtype: torch.dtype = torch.float64, device: str = "cpu", heads: int = 2, features: int = 6
) -> list[Tensor]:
    made = [torch.randn(2, heads, 9, features, dtype=dtype, device=device) for _ in range(3)]
    return [*made, torch.tensor(0.9, dtype=dtype, device=device)]


def function(kind: str, which: Any = norm_softmax_attention, device: str = "cpu") -> Any:
    return lambda q, k, v, tau: which(q, k, v, tau=tau, eps=0.3, **keywords(kind, device=device))


@kinds
def test_gradcheck(backend: Backend, kind: str) -> None:
    # Few numbers: each is moved, and a pass taken for each.
    mine = [t.requires_grad_() for t in tensors(device=backend.device, features=2)]
    mine[0].data *= torch.tensor([0.1, 1.0, 3.0], device=backend.device).repeat(3)[:, None]
    f = function(kind, device=backend.device)
    assert torch.autograd.gradcheck(f, mine, fast_mode=backend.slow)


@kinds
def test_second_derivatives(kind: str, way: str) -> None:  # noqa: F811
    """Of divided queries only where PyTorch's attention has them: its flash kernels say that they
    have none.
    """
    mine = [t.requires_grad_() for t in tensors(heads=1, features=2)]
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(function(kind), mine)
    y = function(kind)(*mine)
    (first,) = torch.autograd.grad(y.square().sum(), mine[0], create_graph=True)
    if way == "by scores":
        first.sum().backward()
        return
    with pytest.raises(RuntimeError, match=r"derivative for .*flash_attention"):
        first.sum().backward()


def test_second_derivatives_of_one_argument() -> None:
    for wanted in range(4):
        mine = tensors(heads=1, features=2)

        def alone(t: Tensor, mine: list[Tensor] = mine, wanted: int = wanted) -> Tensor:
            return function("causal")(*mine[:wanted], t, *mine[wanted + 1 :])

        with sdpa_kernel(SDPBackend.MATH):
            assert torch.autograd.gradgradcheck(alone, mine[wanted].requires_grad_())


def test_one_gradient_alone() -> None:
    for wanted in range(4):
        mine = tensors()
        mine[wanted].requires_grad_()
        found = [
            torch.autograd.grad(function("causal", f)(*mine).square().sum(), mine[wanted])[0]
            for f in (norm_softmax_attention, attention)
        ]
        torch.testing.assert_close(*found)
        assert all(t.grad is None for t in mine)


# The overloads share one signature and one fake: each dtype and causal or not with each of them.
@pytest.mark.parametrize(
    ("overload", "dtype", "causal"),
    [
        ("default", torch.float32, False),
        ("default", torch.bfloat16, True),
        ("reference", torch.float32, True),
        ("reference", torch.bfloat16, False),
    ],
    ids=str,
)
def test_opcheck_kernels(overload: str, dtype: torch.dtype, causal: bool) -> None:
    q, k, _, _ = tensors(dtype)
    k, tau = k[:, :1], torch.tensor(0.9)
    forward, backward = (
        getattr(getattr(torch.ops.effkern, f"_norm_attention_{kind}"), overload)
        for kind in ("forward", "backward")
    )
    options = (tau, 1e-6, 0.4, causal)
    for seen in (None, keywords("padding")["attn_mask"][:, :, 0]):
        torch.library.opcheck(forward, (q, k, seen, *options))
        scaled, _, deviation = forward(q, k, seen, *options)
        for grad_k in (None, torch.randn_like(k)):
            torch.library.opcheck(backward, (scaled, grad_k, q, k, seen, deviation, *options))
    forward, backward = (
        getattr(getattr(torch.ops.effkern, f"_attention_by_scores_{kind}"), overload)
        for kind in ("forward", "backward")
    )
    v, bias = torch.randn(2, 1, 9, 5).to(dtype), torch.randn(1, 1, 9, 9)
    for mask in (None, keywords("any")["attn_mask"], bias):
        call = (q, k, v, mask, *options)
        torch.library.opcheck(forward, call)
        for wants_tau in (False, True):
            torch.library.opcheck(backward, (forward(*call), *call, wants_tau))


def losses(f: Any, given: list[Tensor]) -> list[Tensor]:
    mine = [t.detach().clone().requires_grad_() for t in given]
    loss = f(*mine).square().sum()
    loss.backward()
    return [loss.detach(), *(t.grad for t in mine)]


@kinds
def test_compile(kind: str) -> None:
    torch._dynamo.reset()
    f = function(kind)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    given = tensors(torch.float32)
    torch.testing.assert_close(losses(compiled, given), losses(f, given), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), f(*given))


def test_a_compiled_function_follows_the_backend(way: str) -> None:  # noqa: F811
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    called = []
    compiled = torch.compile(
        norm_softmax_attention,
        fullgraph=True,
        backend=lambda graph, _: called.append(str(graph.graph)) or graph.forward,
    )
    compiled(q, k, v)
    with effkern.use_backend("reference"):
        compiled(q, k, v)
    name = "_attention_by_scores" if way == "by scores" else "_norm_attention"
    assert f"{name}_forward.default" in called[0]
    assert f"{name}_forward.reference" in called[1]


@kinds
def test_func_transforms(kind: str) -> None:
    given = tensors()
    loss = lambda f: lambda *t: f(*t).sin().sum()  # noqa: E731
    mine, stock = (function(kind, f) for f in (norm_softmax_attention, attention))
    for transform in (torch.func.grad, torch.func.jacrev):
        a, b = (transform(loss(f), argnums=(0, 1, 2, 3))(*given) for f in (mine, stock))
        torch.testing.assert_close(a, b)
    tangents = tuple(t.cos() for t in given)
    a, b = (torch.func.jvp(f, tuple(given), tangents) for f in (mine, stock))
    torch.testing.assert_close(a, b)


def test_vmap_and_gradients_of_each_sample() -> None:
    q, k, v, tau = tensors()
    mine = torch.vmap(lambda a, b: norm_softmax_attention(a, b, v, tau=tau))(q, k)
    stock = torch.stack([attention(a, b, v, tau=tau) for a, b in zip(q, k, strict=True)])
    torch.testing.assert_close(mine, stock)
    of_sample = torch.func.grad(lambda a, b: norm_softmax_attention(a, b, b).square().sum())
    many = torch.vmap(of_sample)(q, k)
    torch.testing.assert_close(many[1], of_sample(q[1], k[1]))


@kinds
def test_autocast_as_attention(kind: str) -> None:
    """Api.md, "autocast": the dtype, and the result of a caller who casts himself."""
    q, k, v, _ = tensors(torch.float32)
    given = keywords(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm_softmax_attention(q, k, v, **given)
        stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, **given)
        assert y.dtype == stock.dtype == torch.bfloat16
        wide = norm_softmax_attention(*(t.double() for t in (q, k, v)), **given)
        assert wide.dtype == torch.float64
    cast = norm_softmax_attention(*(t.bfloat16() for t in (q, k, v)), **given)
    assert torch.equal(y, cast)


def test_the_mask_has_a_gradient() -> None:
    """A bias that is learned, as relative positions are."""
    q, k, v, _ = tensors()
    for shape in ((2, 9, 9), (1, 1, 9)):
        bias = torch.randn(shape, dtype=torch.float64)
        found = []
        for f in (norm_softmax_attention, attention):
            mine = bias.clone().requires_grad_()
            found.append(torch.autograd.grad(f(q, k, v, attn_mask=mine).square().sum(), mine)[0])
        torch.testing.assert_close(*found)
