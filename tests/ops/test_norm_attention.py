"""NormSoftmax attention on every backend: values and gradients against float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern.nn.functional import norm_softmax_attention
from tests.support.accuracy import assert_as_accurate
from tests.support.backends import Backend
from tests.support.norm_attention import (
    _only_backends_with_a_kernel,  # noqa: F401
    attention,
    divided_then_attention,
    way,  # noqa: F401
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
LOWEST = torch.finfo(torch.float32).min


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float | Tensor = 1.0,
    atol: float | None = None,
    function: Any = norm_softmax_attention,
    **keywords: Any,
) -> list[Tensor]:
    """Compare values and the gradients of q, k, v and tau with float64, by the rule of agreement.

    Eager PyTorch is the worse of two: all in plain operations, and PyTorch's attention of queries
    that plain operations have divided. The keys of a row cancel in the gradients: a few roundings
    of what cancels are allowed, as large as they are beside the row's deviation.
    """
    leaves = [q, k, v, *([tau] if isinstance(tau, Tensor) else [])]
    grad = torch.randn(math.prod(q.shape[:-1]) * v.shape[-1], dtype=torch.float64)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        mine = [t.detach().to(dtype).requires_grad_() for t in leaves]
        y = function(*mine[:3], tau=mine[3] if len(mine) == 4 else tau, **keywords)
        g = grad.to(y.device, y.dtype)[: y.numel()].view(y.shape)
        found = torch.autograd.grad(y, mine, g, allow_unused=True)
        zeros = (t if t is not None else torch.zeros(()) for t in found)
        return [y.detach(), *zeros]

    exact = run(attention, torch.float64)
    terms = run(partial(attention, through_sigma=False), torch.float64)
    actual, *eager = (run(f, q.dtype) for f in (function, attention, divided_then_attention))
    y = exact[0]
    condition = _condition(q.double(), k.double(), keywords.get("scale"), keywords.get("eps", 1e-6))
    names = ("y", "grad_q", "grad_k", "grad_v", "grad_tau")
    for what, mine, wanted, term, *both in zip(names, actual, exact, terms, *eager, strict=False):
        theirs = max(both, key=lambda t: _distance(t, wanted))
        slack = atol
        if slack is None and wanted.numel():
            slack = 8 * torch.finfo(q.dtype).eps * max(1.0, term.abs().max().item())
            if what in ("grad_q", "grad_k"):
                slack *= max(1.0, condition)
            if what == "grad_tau":  # a sum over all rows, in which they cancel
                slack *= math.sqrt(y.numel())
        assert_as_accurate(mine, theirs, wanted, atol=slack or 0.0, what=what)
    return actual


def _condition(q: Tensor, k: Tensor, scale: float | None, eps: float) -> float:
    """How much a rounding of a normalised score is magnified, in a typical row."""
    if not q.numel() or not k.numel():
        return 1.0
    length = q.norm(dim=-1).mean() * (k - k.mean(-2, keepdim=True)).norm(dim=-1).mean()
    size = length * (q.shape[-1] ** -0.5 if scale is None else abs(scale))
    return min(size.item(), size.item() / eps)


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b).abs().nan_to_num().max().item() if a.numel() else 0.0


def tensors(
    batch: int = 2,
    heads: int = 3,
    rows: int = 70,
    keys: int | None = None,
    features: int = 16,
    *,
    key_heads: int | None = None,
    value_features: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spread: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values; ``spread`` is about the deviation of the scores."""
    keys = rows if keys is None else keys
    key_heads = heads if key_heads is None else key_heads
    q = spread * torch.randn(batch, heads, rows, features, dtype=torch.float64)
    k = torch.randn(batch, key_heads, keys, features, dtype=torch.float64)
    v = torch.randn(batch, key_heads, keys, value_features or features, dtype=torch.float64)
    return tuple(t.to(device, dtype) for t in (q, k, v))  # type: ignore[return-value]


def padding(batch: int, keys: int, device: str = "cpu", heads: int = 1) -> Tensor:
    """Hides the end of each batch entry's keys, or their beginning, or every other one."""
    mask = torch.ones(batch, heads, 1, keys, dtype=torch.bool, device=device)
    for i in range(batch):
        for h in range(heads):
            cut = (keys // 3 + 5 * i + 3 * h) % max(keys, 1)
            mask[i, h, 0, (slice(cut, None), slice(0, cut), slice(0, None, 2))[(i + h) % 3]] = False
    return mask


def masks(batch: int, rows: int, keys: int, device: str) -> dict[str, dict[str, Any]]:
    """Keywords by name: every kind of mask."""
    general = torch.rand(batch, 1, rows, keys, device=device) > 0.4
    general[..., 0] = True
    bias = torch.randn(batch, 1, rows, keys, device=device)
    pad = padding(batch, keys, device)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "padding": {"attn_mask": pad},
        "padding of each head": {"attn_mask": padding(batch, keys, device, 3)},
        "padding, additive": {"attn_mask": torch.where(pad, bias[:, :, :1], LOWEST)},
        "padding of inf": {"attn_mask": torch.where(pad, 0.0, -math.inf)},
        "any": {"attn_mask": general},
        "any, additive": {"attn_mask": torch.where(general, bias, LOWEST)},
        "of two dimensions": {"attn_mask": general[0, 0]},
        "a bias": {"attn_mask": bias},
        "causal as a mask": {"attn_mask": torch.ones_like(general).tril()},
    }


@pytest.mark.parametrize("kind", list(masks(1, 2, 2, "cpu")))
@dtypes
def test_values_and_gradients(backend: Backend, dtype: torch.dtype, kind: str) -> None:
    device = backend.device
    for spread, tau in ((0.3, 1.0), (3.0, torch.tensor(0.7, dtype=torch.float64))):
        q, k, v = tensors(dtype=dtype, device=device, spread=spread)
        keywords = masks(2, 70, 70, device)[kind]
        check(q, k, v, tau=tau if spread == 0.3 else tau.to(device), **keywords)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (63, 64), (64, 64), (65, 66), (129, 200)])
def test_lengths_around_a_chunk(backend: Backend, sizes: tuple[int, int], causal: bool) -> None:
    for rows, keys in (sizes, sizes[::-1]):
        q, k, v = tensors(1, 2, rows, keys, 8, device=backend.device, spread=0.5)
        check(q, k, v, is_causal=causal, tau=torch.tensor(0.4, device=backend.device))


@pytest.mark.parametrize("features", [1, 2, 3, 7, 8, 17, 33, 64, 80, 96, 130])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_numbers_of_features(backend: Backend, features: int, causal: bool) -> None:
    rows = max(66, features)
    q, k, v = tensors(1, 2, rows, rows, features, device=backend.device)
    # A query may be orthogonal to what little it sees: eps keeps its gradient from being all noise.
    check(q, k, v, is_causal=causal, eps=0.05)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "any"])
def test_grouped_query_heads(backend: Backend, key_heads: int, kind: str) -> None:
    q, k, v = tensors(2, 6, 70, 90, 16, key_heads=key_heads, device=backend.device)
    check(q, k, v, enable_gqa=True, **masks(2, 70, 90, backend.device)[kind])


def test_a_mask_of_each_query_head_of_a_group() -> None:
    q, k, v = tensors(2, 6, 40, 50, 16, key_heads=2)
    check(q, k, v, enable_gqa=True, attn_mask=padding(2, 50, heads=6))
    check(q, k, v[:, :1], enable_gqa=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_values_of_another_size(backend: Backend, causal: bool) -> None:
    q, k, v = tensors(1, 2, 40, 50, 16, value_features=5, device=backend.device)
    check(q, k, v, is_causal=causal)


def test_sizes_of_leading_dimensions() -> None:
    for shape in ((), (3,), (2, 3), (2, 2, 3), (1, 2, 1, 3)):
        q, k, v = (torch.randn(*shape, 20, 8) for _ in range(3))
        assert check(q, k, v)[0].shape == (*shape, 20, 8)
        check(q, k, v, is_causal=True, eps=0.3)
        check(q, k, v, attn_mask=torch.rand(20, 20) > 0.3)
        if shape:
            pad = torch.rand(shape[-1], 1, 20) > 0.3
            check(q, k, v, attn_mask=pad)
    q, k, v = torch.randn(2, 3, 20, 8), torch.randn(3, 20, 8), torch.randn(2, 1, 20, 8)
    check(q, k, v)
    check(
        torch.randn(2, 2, 4, 20, 8), *(torch.randn(2, 2, 2, 20, 8) for _ in "kv"), enable_gqa=True
    )


def test_few_rows_are_done_by_their_scores(backend: Backend) -> None:
    """As in decoding: one query for many keys."""
    for rows in (1, 2, 3, 4, 9):
        q, k, v = tensors(2, 4, rows, 300, 16, key_heads=2, device=backend.device)
        check(q, k, v, enable_gqa=True)
        check(q, k, v, enable_gqa=True, attn_mask=padding(2, 300, backend.device))
        check(q, k, v, enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "any"])
def test_each_branch_of_the_divisor(backend: Backend, kind: str) -> None:
    """Sigma below eps, between eps and tau, and above tau; each is there, and so are its gradients.

    Eps is large here, so that what is divided by it is no noise.
    """
    device = backend.device
    q, k, v = tensors(2, 3, 80, 80, 16, device=device)
    q = q * torch.logspace(-3, 1, 80, device=device)[torch.randperm(80)][:, None]
    eps, tau = 0.05, torch.tensor(0.8, device=device)
    sigma = (q @ k.transpose(-2, -1) / 4).std(-1, correction=0)
    assert all(n > 5 for n in ((sigma < eps).sum(), (sigma > tau).sum()))
    assert ((sigma > eps) & (sigma < tau)).sum() > 5
    check(q, k, v, eps=eps, tau=tau, **masks(2, 80, 80, device)[kind])


@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
def test_chunks_whose_sigmas_are_all_above_tau(backend: Backend, kind: str) -> None:
    """A kernel may skip what has no gradient through sigma, between chunks that have one."""
    q, k, v = tensors(1, 2, 200, 200, 16, device=backend.device, spread=0.3)
    q[:, :, 64:128] *= 100
    tau = torch.tensor(1.0, device=backend.device)
    check(q, k, v, tau=tau, **masks(1, 200, 200, backend.device)[kind])


def test_eps_above_tau(backend: Backend) -> None:
    q, k, v = tensors(1, 2, 40, 40, 8, device=backend.device)
    tau = torch.tensor(0.1, device=backend.device)
    for causal in (False, True):
        *_, of_tau = check(q, k, v, eps=0.5, tau=tau, is_causal=causal)
        assert of_tau == 0


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "any"])
@dtypes
def test_keys_that_are_all_alike(backend: Backend, dtype: torch.dtype, kind: str) -> None:
    """Api.md, "sigma below eps": constant rows give a uniform distribution."""
    device = backend.device
    keywords = masks(2, 70, 70, device)[kind]
    q, k, v = tensors(dtype=dtype, device=device)
    k = (k[:, :, :1] + 3).expand_as(k).clone()
    for t in (q, k, v):
        t.requires_grad_()
    y = norm_softmax_attention(q, k, v, **keywords)
    exact = attention(torch.zeros_like(q).double(), k.double(), v.double(), **keywords)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)
    if dtype != torch.float16:  # where gradients over eps leave its range
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.float().sum(), (q, k, v)))


@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "any"])
def test_keys_with_a_large_common_offset(backend: Backend, offset: float, kind: str) -> None:
    q, k, v = tensors(2, 3, 150, 150, 16, device=backend.device)
    k = k + offset * torch.randn(16, device=backend.device)
    check(q, k, v, **masks(2, 150, 150, backend.device)[kind])


@pytest.mark.parametrize("kind", ["all", "one row", "one head of two"])
def test_two_first_keys_far_from_the_others(backend: Backend, kind: str) -> None:
    """They are alike, but the others do not share what they do."""
    q, k, v = tensors(2, 4, 40, 50, key_heads=2, device=backend.device)
    k[:, :, :2], v[:, :, :2] = 0, 1
    k[:, :, :2, 0] = 3000
    mask = torch.ones(4, 40, 50, dtype=torch.bool, device=backend.device)
    if kind == "one row":
        mask[:, 1:, :2] = False
    if kind == "one head of two":
        mask[1::2, :, :2] = False
        mask[::2, :, 2:] = False
    keywords: Any = {"attn_mask": None if kind == "all" else mask, "enable_gqa": True}
    y = norm_softmax_attention(q, k, v, **keywords)
    exact = attention(q.double(), k.double(), v.double(), **keywords)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("near", [2, 40, 48, 100])
def test_causal_keys_that_share_an_offset_up_to_one(
    backend: Backend,
    near: int,
    way: str,  # noqa: F811
) -> None:
    """The offset is taken off for the rows before that one, which lose no digits to it."""
    if way == "divided" or backend.name == "reference":
        pytest.skip("the first two keys decide there, for all rows")
    q, k, v = tensors(1, 2, 150, 150, 16, device=backend.device)
    k[:, :, :near, 0] += 3000
    check(q, k, v, is_causal=True)
    y = norm_softmax_attention(q, k, v, is_causal=True)[:, :, :near].double()
    exact = attention(q.double(), k.double(), v.double(), is_causal=True)[:, :, :near]
    torch.testing.assert_close(y, exact, rtol=0, atol=2e-5)
    changed = k.clone()
    changed[:, :, near:] = 0
    again = norm_softmax_attention(q, changed, v, is_causal=True)[:, :, :near].double()
    assert torch.equal(again, y)


@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
def test_a_first_key_far_from_the_others(backend: Backend, kind: str) -> None:
    """As the keys of attention sinks are."""
    q, k, v = tensors(2, 3, 150, 150, 16, device=backend.device)
    k[:, :, 0] *= 100
    for dtype in (torch.float32, torch.bfloat16):
        check(q.to(dtype), k.to(dtype), v.to(dtype), **masks(2, 150, 150, backend.device)[kind])


@pytest.mark.parametrize("size", [1e-4, 1e2, 1e4])
def test_large_and_small_values(backend: Backend, size: float) -> None:
    q, k, v = tensors(1, 2, 80, 80, 16, device=backend.device)
    for causal in (False, True):
        check(q, size * k, v, is_causal=causal)
        check(size * q, size * k, v, is_causal=causal, tau=size)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 1e-3])
def test_a_scale(backend: Backend, scale: float) -> None:
    q, k, v = tensors(1, 2, 40, 40, 8, device=backend.device)
    for causal in (False, True):
        check(q, k, v, scale=scale, is_causal=causal)


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("kind", ["padding", "any"])
def test_rows_that_see_nothing_or_one_key(backend: Backend, kind: str, additive: bool) -> None:
    """Api.md, "fewer than two visible entries": zeros and zero gradients; sigma counts as tau."""
    device = backend.device
    q, k, v = tensors(3, 2, 40, 40, 16, device=device)
    mask = torch.rand(3, 1, 1 if kind == "padding" else 40, 40, device=device) > 0.5
    mask[0] = False
    mask[1] = torch.arange(40, device=device) == 7
    given = torch.where(mask, 0.0, LOWEST) if additive else mask
    y, of_q, of_k, of_v = check(q, k, v, attn_mask=given)
    assert not y[0].any() and not of_q[0].any() and not of_k[0].any() and not of_v[0].any()
    torch.testing.assert_close(y[1], v[1, :, 7:8].expand(2, 40, 16))
    torch.testing.assert_close(of_q[1], torch.zeros_like(of_q[1]), rtol=0, atol=1e-6)


def test_hidden_keys_may_hold_anything(backend: Backend) -> None:
    """Their values do not enter the statistics, nor the gradients."""
    q, k, v = tensors(2, 2, 40, 40, 16, device=backend.device)
    mask = padding(2, 40, backend.device)
    hidden = ~mask.transpose(-2, -1)
    expected = norm_softmax_attention(q, k, v, attn_mask=mask)
    for value in (1e4, 1e30):
        spoiled = torch.where(hidden, value, k).requires_grad_()
        y = norm_softmax_attention(q, spoiled, v, attn_mask=mask)
        torch.testing.assert_close(y, expected)
        (of_k,) = torch.autograd.grad(y.sum(), spoiled)
        assert of_k.isfinite().all() and not (of_k * hidden).any()


@dtypes
def test_causal_attention_knows_nothing_of_what_comes(backend: Backend, dtype: torch.dtype) -> None:
    """Bit for bit, though keys share an offset and statistics."""
    q, k, v = tensors(1, 2, 200, 200, 16, dtype=dtype, device=backend.device)
    for seen in (1, 2, 63, 64, 65, 130):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, :, seen:] = 50 * torch.randn_like(k[:, :, seen:])
        other_v[:, :, seen:] = 7
        a = norm_softmax_attention(q, k, v, is_causal=True)
        b = norm_softmax_attention(q, other_k, other_v, is_causal=True)
        assert torch.equal(a[:, :, :seen], b[:, :, :seen])


@pytest.mark.parametrize("rows", [1, 20])
def test_keys_after_the_last_row_of_causal_attention(backend: Backend, rows: int) -> None:
    """They may hold anything: nothing reads them, which for few rows would be most of the work."""
    q, k, v = tensors(2, 4, rows, 100, key_heads=2, device=backend.device)
    k[:, :, rows:], v[:, :, rows:] = math.nan, math.nan
    given = [t.requires_grad_() for t in (q, k, v)]
    y = norm_softmax_attention(*given, is_causal=True, enable_gqa=True)
    of_q, *of_kv = torch.autograd.grad(y.sum(), given)
    alone = norm_softmax_attention(
        q, k[:, :, :rows], v[:, :, :rows], is_causal=True, enable_gqa=True
    )
    assert torch.equal(y, alone) and of_q.isfinite().all()
    for g in of_kv:
        assert g.isfinite().all() and not g[:, :, rows:].any()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_empty(backend: Backend, shape: tuple[int, ...], causal: bool) -> None:
    batch, heads, rows, keys = shape
    q = torch.randn(batch, heads, rows, 8, device=backend.device, requires_grad=True)
    k, v = (
        torch.randn(batch, heads, keys, 8, device=backend.device, requires_grad=True) for _ in "kv"
    )
    y = norm_softmax_attention(q, k, v, is_causal=causal)
    assert y.shape == (batch, heads, rows, 8) and not y.any()
    for t, g in zip((q, k, v), torch.autograd.grad(y.sum(), (q, k, v)), strict=True):
        assert g.shape == t.shape and not g.any()


def test_values_of_no_features(backend: Backend) -> None:
    """They pass no gradient on, whatever a kernel's memory held before."""
    q, k, v = (t.requires_grad_() for t in tensors(device=backend.device))
    tau = torch.tensor(0.5, device=backend.device, requires_grad=True)
    for kept in (v, v[..., :0]):
        y = norm_softmax_attention(q, k, kept, tau=tau)
        found = torch.autograd.grad(y.sum(), (q, k, tau))
    assert y.shape == (*q.shape[:-1], 0) and not any(t.any() for t in found)


def test_no_features() -> None:
    q, k, v = torch.randn(1, 2, 4, 0), torch.randn(1, 2, 6, 0), torch.randn(1, 2, 6, 3)
    torch.testing.assert_close(
        norm_softmax_attention(q, k, v), v.mean(-2, keepdim=True).expand(1, 2, 4, 3)
    )


@pytest.mark.parametrize("layout", ["heads last", "sliced", "expanded", "packed"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_layouts(backend: Backend, layout: str, causal: bool) -> None:
    device = backend.device
    if layout == "heads last":
        made = [torch.randn(2, 70, 3, 16, device=device).transpose(1, 2) for _ in range(3)]
    elif layout == "sliced":
        made = [torch.randn(2, 3, 140, 34, device=device)[:, :, ::2, 1:33:2] for _ in range(3)]
    elif layout == "expanded":
        made = [torch.randn(1, 1, 70, 16, device=device).expand(2, 3, 70, 16) for _ in range(3)]
    else:
        qkv = torch.randn(2, 70, 3, 3, 16, device=device)
        made = [qkv[:, :, i].transpose(1, 2) for i in range(3)]
    check(*made, is_causal=causal)


@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
def test_results_are_reproducible(backend: Backend, kind: str) -> None:
    """Bit for bit, whatever the number of threads."""
    q, k, v = tensors(2, 4, 150, 150, 16, key_heads=2, device=backend.device)
    keywords = masks(2, 150, 150, backend.device)[kind]

    def results() -> tuple[Tensor, ...]:
        mine = [t.clone().requires_grad_() for t in (q, k, v)]
        y = norm_softmax_attention(*mine, enable_gqa=True, **keywords)
        return (y, *torch.autograd.grad(y.square().sum(), mine))

    threads = torch.get_num_threads()
    first = results()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, first, results()))
    finally:
        torch.set_num_threads(threads)


def test_dropout_is_on_the_probabilities() -> None:
    """Api.md, "dropout in attention": as torch, with the same random numbers."""
    q, k, v = tensors(2, 3, 40, 40, 16)
    torch.manual_seed(3)
    y = norm_softmax_attention(q, k, v, dropout_p=0.4, tau=1e-30, eps=1.0)  # divisor 1
    torch.manual_seed(3)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.testing.assert_close(y, stock, rtol=1e-4, atol=1e-5)
    assert not norm_softmax_attention(q, k, v, dropout_p=1.0).any()


def test_the_memory_is_linear_in_the_length() -> None:
    """No op makes a tensor of the size of the scores, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kw or {}))
            for t in result if isinstance(result, tuple | list) else (result,):
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return result

    rows = 1024
    mine = [t.requires_grad_() for t in tensors(1, 2, rows, rows, 16)]
    for kind in ("none", "causal", "padding"):
        keywords = masks(1, rows, rows, "cpu")[kind]
        with Largest():
            norm_softmax_attention(*mine, **keywords).sum().backward()
    assert 0 < largest <= 4 * mine[0].numel() < 2 * rows * rows
