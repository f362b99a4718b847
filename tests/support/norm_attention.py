"""NormSoftmax attention as its definition says, for tests: scores, deviations, softmax, values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _only_backends_with_a_kernel(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend").name
        if name in ("simt", "triton"):
            pytest.skip(f"attention has no kernel of {name}: docs/norm_softmax.md, Backends")


#: How attention is computed: see `effkern.ops.norm_attention._scores_suit`.
WAYS = ("by scores", "divided")


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way for all dtypes and sizes; what few keys need beside the second is left out, see
    test_norm_attention_few_keys.py.
    """
    chosen: str = request.param
    kind = _parameters(request).get("kind", "")
    if chosen == "divided" and kind.startswith(("any", "of two", "a bias", "causal as")):
        pytest.skip("a mask that tells rows apart goes by scores either way")
    choose_way(chosen, monkeypatch)
    return chosen


def choose_way(chosen: str, monkeypatch: pytest.MonkeyPatch, few_keys: int = 0) -> None:
    """For all dtypes and sizes."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    most = dict.fromkeys(dtypes, 1 << 30) if chosen == "by scores" else {}
    monkeypatch.setattr("effkern.ops.norm_attention.MOST_KEYS", most)
    monkeypatch.setattr("effkern.ops.attention_without_scores.FEW_KEYS", few_keys)


def _parameters(request: pytest.FixtureRequest) -> dict[str, Any]:
    callspec = getattr(request.node, "callspec", None)
    return callspec.params if callspec else {}


def visible(mask: Tensor | None, causal: bool, rows: int, keys: int, device: Any) -> Tensor:
    """Which keys each row sees, in a shape that broadcasts to the scores."""
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril()
    if mask is None:
        return seen
    if mask.dtype == torch.bool:
        return seen & mask
    return seen & (mask > torch.finfo(mask.dtype).min / 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    tau: Any = 1.0,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    through_sigma: bool = True,
) -> Tensor:
    """In the dtype of its arguments, as a user would write it from the paper.

    Without ``through_sigma`` the gradient takes sigma for a number: of q and k it is then as large
    as the terms that cancel in the right one.
    """
    assert dropout_p == 0.0
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    scores = q @ k.transpose(-2, -1) * scale
    by, seen, count = _divisor(scores, attn_mask, is_causal, tau, eps)
    logits = scores / (by if through_sigma else by.detach())
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logits = logits + torch.where(seen, attn_mask, 0).to(logits.dtype)
    logits = logits.masked_fill(~seen, -math.inf).masked_fill(count == 0, 0)
    return torch.softmax(logits, -1).masked_fill(count == 0, 0) @ v


def divided_then_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    tau: Any = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """The same with PyTorch's attention: queries over their divisors, which are by the scores."""
    keys = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if enable_gqa else k
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ keys.transpose(-2, -1) * factor
    by, seen, count = _divisor(scores, attn_mask, is_causal, tau, eps)
    mask = seen
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        mask = torch.where(seen, attn_mask.to(q.dtype), -math.inf)
    y = torch.nn.functional.scaled_dot_product_attention(
        (q / by) * (factor > 0 or -1), k, v, mask, scale=abs(factor) or 1e-30, enable_gqa=enable_gqa
    )
    return y.masked_fill(count == 0, 0)


def _divisor(
    scores: Tensor, attn_mask: Tensor | None, is_causal: bool, tau: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's, where it sees a key, and how many it sees."""
    seen = visible(attn_mask, is_causal, *scores.shape[-2:], scores.device).expand(scores.shape)
    count = seen.sum(-1, keepdim=True)
    inside = torch.where(seen, scores, 0)
    mean = inside.sum(-1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(seen, scores - mean, 0).square().sum(-1, keepdim=True)
    variance = squares / count.clamp(min=1)
    sigma = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
    tau = torch.as_tensor(tau, dtype=scores.dtype, device=scores.device)
    return torch.where(count < 2, tau, torch.minimum(sigma, tau)).clamp(min=eps), seen, count
