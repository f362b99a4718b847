"""NormSoftmax attention's rows that see few keys: by the definition, and as accurate as it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from effkern.nn.functional import norm_softmax_attention
from effkern.ops import norm_attention
from tests.support.accuracy import assert_as_accurate
from tests.support.backends import Backend
from tests.support.norm_attention import (
    _only_backends_with_a_kernel,  # noqa: F401
    attention,
)

FEW = norm_attention.FEW_KEYS


def check(*tensors: Tensor, rows: slice = slice(None), **keywords: Any) -> None:
    """Compare some rows, and all gradients through them, with float64: nothing is allowed for what
    cancels.
    """
    grad = torch.randn(*tensors[0].shape[:-1], tensors[2].shape[-1], dtype=torch.float64)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        mine = [t.to(dtype).requires_grad_() for t in tensors]
        y = function(*mine, **keywords)[..., rows, :]
        return [y.detach(), *torch.autograd.grad(y, mine, grad.to(y)[..., rows, :])]

    dtype = tensors[0].dtype
    exact, eager = run(attention, torch.float64), run(attention, dtype)
    actual = run(norm_softmax_attention, dtype)
    for name, *three in zip(("y", "grad_q", "grad_k", "grad_v"), actual, eager, exact, strict=True):
        assert_as_accurate(*three, what=name, atol=4 * torch.finfo(dtype).eps)


def orthogonal(n: int, row: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Of which one query is all but orthogonal to the difference of the first two keys."""
    q, k, v = (torch.randn(2, 3, n, 16, dtype=torch.float64) for _ in range(3))
    difference = k[..., 0, :] - k[..., 1, :]
    along = (q[..., row, :] * difference).sum(-1, True) / difference.square().sum(-1, True)
    q[..., row, :] -= 0.99 * along * difference
    return [t.to(device, dtype) for t in (q, k, v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_keys(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v = orthogonal(5, 3, dtype, backend.device)
    check(q, k[..., :2, :], v[..., :2, :])


@pytest.mark.parametrize("n", [FEW - 1, FEW, FEW + 1, 3 * FEW])
def test_the_first_rows_of_causal_attention(backend: Backend, n: int) -> None:
    check(*orthogonal(n, 1, torch.float32, backend.device), rows=slice(FEW), is_causal=True)


@pytest.mark.parametrize("keys", [50, 70])
@pytest.mark.parametrize("group", [1, 2])
def test_all_rows_of_causal_attention_together(backend: Backend, keys: int, group: int) -> None:
    sizes = (4, 70), (4 // group, keys), (4 // group, keys)
    tensors = [
        torch.randn(2, *size, 16, dtype=torch.float64, device=backend.device, requires_grad=True)
        for size in sizes
    ]
    y, expected = (
        f(*tensors, is_causal=True, enable_gqa=group > 1)
        for f in (norm_softmax_attention, attention)
    )
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for found in zip(
        *(torch.autograd.grad(out, tensors, grad) for out in (y, expected)), strict=True
    ):
        torch.testing.assert_close(*found)


def test_a_causal_result_changed_in_place_is_noticed() -> None:
    """As of PyTorch's attention, whose backward pass needs it."""
    tensors = [torch.randn(1, 2, 70, 16, requires_grad=True) for _ in range(3)]
    y = norm_softmax_attention(*tensors, is_causal=True).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_causal_gradients_leave_those_that_come_alone() -> None:
    x = torch.randn(1, 2, 70, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    given = grad.clone()
    found = [
        torch.autograd.grad(f(x, x, x, is_causal=True), x, grad)[0]
        for f in (norm_softmax_attention, attention)
    ]
    torch.testing.assert_close(*found)
    assert torch.equal(grad, given)


def test_causal_inference() -> None:
    tensors = [torch.randn(1, 2, 70, 16, requires_grad=True) for _ in range(3)]
    y = norm_softmax_attention(*tensors, is_causal=True)
    with torch.no_grad():
        assert torch.equal(norm_softmax_attention(*tensors, is_causal=True), y)


@pytest.mark.parametrize("kind", ["none", "padding", "any", "additive", "causal"])
def test_masks(backend: Backend, kind: str) -> None:
    q, k, v = (torch.randn(2, 4, n, 8, device=backend.device) for n in (40, 9, 9))
    seen = torch.rand(2, 1, 40, 9, device=backend.device) > 0.4
    bias = torch.where(seen, torch.randn(40, 9, device=backend.device), torch.finfo().min)
    given = {
        "none": {},
        "padding": {"attn_mask": seen[..., :1, :]},
        "any": {"attn_mask": seen},
        "additive": {"attn_mask": bias},
        "causal": {"is_causal": True},
    }[kind]
    check(q, k, v, **given)
    check(q, k[:, ::2], v[:, ::2], enable_gqa=True, scale=-0.7, **given)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_with_a_large_common_offset(backend: Backend, causal: bool) -> None:
    """Which eager PyTorch pays for, and this does not."""
    q, k, v = (torch.randn(2, 3, 20, 16, device=backend.device) for _ in range(3))
    far = k + 1e4
    k = far - 1e4
    near, there = (norm_softmax_attention(q, keys, v, is_causal=causal) for keys in (k, far))
    torch.testing.assert_close(there, near, rtol=1e-5, atol=1e-5)


def test_what_is_hidden_may_hold_anything(backend: Backend) -> None:
    q, k, v = (torch.randn(2, 3, 20, 16, device=backend.device) for _ in range(3))
    seen = torch.ones(2, 1, 1, 20, dtype=torch.bool, device=backend.device)
    seen[..., 3:7] = False
    other = [t.masked_fill(~seen.transpose(-1, -2), 1e30) for t in (k, v)]
    found = [norm_softmax_attention(q, *kv, attn_mask=seen) for kv in ((k, v), other)]
    torch.testing.assert_close(*found)


def test_dropout() -> None:
    q, k, v = torch.randn(4, 20, 8), torch.randn(4, 20, 8), torch.eye(20).expand(4, 20, 20)
    kept = norm_softmax_attention(q, k, v)
    dropped = norm_softmax_attention(q, k, v, dropout_p=0.4)
    there = dropped != 0
    torch.testing.assert_close(dropped[there], kept[there] / 0.6)
    assert 0.5 < there.double().mean() < 0.7


def test_second_derivatives() -> None:
    """Where all rows see few keys, PyTorch's attention, which has none, is not asked."""
    mine = [torch.randn(1, 1, 5, 2, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradgradcheck(partial(norm_softmax_attention, is_causal=True), mine)
    with sdpa_kernel(SDPBackend.MATH):
        many = [torch.randn(1, 1, FEW + 3, 2, requires_grad=True) for _ in range(3)]
        (first,) = torch.autograd.grad(
            norm_softmax_attention(*many, is_causal=True).square().sum(), many[0], create_graph=True
        )
        first.sum().backward()


def test_compile_by_inductor_with_lengths_on_both_sides() -> None:
    torch._dynamo.reset()
    f = partial(norm_softmax_attention, is_causal=True)
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for rows in (9, 17, 70, 100):
        q, k, v = (torch.randn(1, 2, rows, 8) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v), f(q, k, v), rtol=1e-4, atol=1e-5)
