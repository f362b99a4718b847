"""NormSoftmax attention's rows that see few keys: by the definition, and as accurate as it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from effkern.nn.functional import norm_softmax_attention
from effkern.ops import attention_without_scores, norm_attention
from tests.support.accuracy import assert_as_accurate
from tests.support.backends import Backend
from tests.support.norm_attention import (
    _only_backends_with_a_kernel,  # noqa: F401
    attention,
    choose_way,
)

FEW = attention_without_scores.FEW_KEYS


@pytest.fixture(autouse=True)
def _divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done for few keys beside divided queries; the other way needs nothing."""
    choose_way("divided", monkeypatch, FEW)


def check(
    *tensors: Tensor,
    rows: slice = slice(None),
    keep: Tensor | None = None,
    function: Any = norm_softmax_attention,
    **keywords: Any,
) -> None:
    """Compare some rows, and all gradients through them, with float64: nothing is allowed for what
    cancels, some roundings for sums over the rows of a group of heads in one go.
    """
    grad = torch.randn(*tensors[0].shape[:-1], tensors[2].shape[-1], dtype=torch.float64)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        mine = [t.to(dtype).requires_grad_() for t in tensors]
        y = function(*mine, **keywords)[..., rows, :]
        y = y if keep is None else y.masked_fill(~keep, 0)
        return [y.detach(), *torch.autograd.grad(y, mine, grad.to(y)[..., rows, :])]

    dtype = tensors[0].dtype
    exact, eager = run(attention, torch.float64), run(attention, dtype)
    actual = run(function, dtype)
    for name, *three in zip(("y", "grad_q", "grad_k", "grad_v"), actual, eager, exact, strict=True):
        assert_as_accurate(*three, what=name, atol=32 * torch.finfo(dtype).eps)


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


def padded(n: int, hidden: list[int], left: bool, device: str) -> Tensor:
    """Which of n keys each batch entry sees: all but the first, or the last, so many."""
    place = torch.arange(n, device=device)
    cut = torch.tensor(hidden, device=device)[:, None]
    return place >= cut if left else place < n - cut


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("additive", [False, True])
def test_padding_that_leaves_few_keys(backend: Backend, left: bool, additive: bool) -> None:
    q, k, v = orthogonal(40, 3, torch.float32, backend.device)
    if not left:
        q, k, v = (t.flip(-2) for t in (q, k, v))
    for hidden in ([38, 0], [38, 37], [40, 38], [39, 32]):
        mask = padded(40, hidden, not left, backend.device)[:, None, None, :]
        few = mask.sum(-1, keepdim=True) <= FEW
        if additive:
            bias = torch.randn(40, device=backend.device)
            mask = torch.where(mask, bias, torch.finfo(torch.float32).min)
        check(q, k, v, keep=few, attn_mask=mask)
        check(q, k[:, :1], v[:, :1], keep=few, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("hidden", [[0, 30], [7, 68], [69, 70]])
@pytest.mark.parametrize("keys", [50, 70, 90])
def test_padding_on_the_left_of_causal_attention(
    backend: Backend, hidden: list[int], keys: int
) -> None:
    """As a layer's `key_padding_mask` with `is_causal`: the first rows of a text see few keys."""
    q, k, v = (torch.randn(2, 3, n, 16, device=backend.device) for n in (70, keys, keys))
    seen = padded(keys, hidden, True, backend.device)
    sees = seen[:, None, None, :] & torch.ones(70, keys, device=backend.device).bool().tril()
    few = sees.sum(-1, keepdim=True) <= FEW

    def function(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return norm_attention.attend(
            *(q, k, v),
            attn_mask=None,
            key_mask=seen,
            dropout_p=0.0,
            is_causal=True,
            scale=None,
            enable_gqa=False,
            tau=1.0,
            eps=1e-6,
        )

    check(q, k, v, keep=few, function=function, attn_mask=sees)
    torch.testing.assert_close(
        function(q, k, v), attention(q, k, v, attn_mask=sees), rtol=1e-4, atol=1e-4
    )


def test_gradients_leave_those_that_come_alone() -> None:
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
    q, k, v = (torch.randn(2, 4, n, 8, device=backend.device) for n in (40, FEW, FEW))
    seen = torch.rand(2, 1, 40, FEW, device=backend.device) > 0.4
    bias = torch.where(seen, torch.randn(40, FEW, device=backend.device), torch.finfo().min)
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
    q, k, v = (torch.randn(2, 3, FEW, 16, device=backend.device) for _ in range(3))
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
    for rows in (5, 70, 100):
        q, k, v = (torch.randn(1, 2, rows, 8) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v), f(q, k, v), rtol=1e-4, atol=1e-5)
