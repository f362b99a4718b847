"""NormSoftmax attention without its scores: the ops that divide the queries, their gradient, and
PyTorch's attention of what they give.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from effkern.backends.reference import norm_attention as reference
from effkern.backends.reference.norm_attention import restricted
from effkern.ops._declare import Family, declare
from effkern.ops._modes import may_be_looked_at
from effkern.ops.attention_by_scores import Numbers, by_scores
from effkern.ops.norm_attention_checks import Seen, read_mask
from effkern.ops.norm_softmax_checks import tau_tensor


def without_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    gqa: bool,
    how: Numbers,
) -> Tensor:
    """NormSoftmax attention of checked arguments.

    Args:
        q: shape (B, H, L, E).
        k: shape (B, Hk, S, E), where Hk divides H.
        v: shape (B, Hv, S, Ev), where Hv divides H.
        mask: boolean or additive, four dimensions that broadcast to (B, H, L, S), the same for all
            rows unless a tensor is empty; or None.
        key_mask: boolean, shape (B, S): the keys that may be seen; or None.
        gqa: whether Hk or Hv may be less than H.
        how: the numbers.

    Returns:
        Shape (B, H, L, Ev).
    """
    causal, scale, tau, eps, dropout_p = how
    seen = read_mask(mask, key_mask, causal, q, k)
    scaled, shifted = q, k
    if q.numel() and k.numel():
        if seen.keys is not None and seen.keys.shape[1] not in (1, k.shape[1]):
            k = shifted = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scaled, shifted = divide(q, k, seen, scale, tau, eps)
    if scale <= 0:  # PyTorch's kernels multiply what a mask hides by it
        scaled, scale = scaled * (-1 if scale < 0 else 0), -scale or 1.0
    for_softmax = _as_kernels_read_it(seen.for_softmax, q)
    with _trusted_kernels(q, k, v):
        y = F.scaled_dot_product_attention(
            scaled,
            shifted,
            v,
            attn_mask=for_softmax,
            dropout_p=dropout_p,
            is_causal=causal and for_softmax is None,
            scale=scale,
            enable_gqa=gqa,
        )
    if seen.some is not None:
        y = torch.where(seen.some, y, 0)
    if FEW_KEYS and q.numel() and k.numel() and (causal or seen.keys is not None):
        y = _with_rows_that_see_few(y, q, k, v, mask, seen, how)
    return y


#: So many keys, or fewer, are few: a query is often all but orthogonal to the differences of two,
#: and dividing it magnifies the rounding of all that is not along them. From four keys on it was as
#: accurate as the definition.
FEW_KEYS = 8


def _with_rows_that_see_few(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seen: Seen, how: Numbers
) -> Tensor:
    """Y with its rows that see few keys by their scores with those, which come before all others
    that any row of their batch and head sees.
    """
    rows = q.shape[-2]
    if seen.keys is None:
        first = min(rows, FEW_KEYS)
        q, k, v = (t[..., :first, :] for t in (q, k, v))
        few = by_scores(q, k, v, None, None, how)
        return torch.cat((few, y[..., first:, :]), -2)
    count = _count(seen.keys, rows, seen.causal)
    if may_be_looked_at(count):
        is_few = (count <= FEW_KEYS).flatten(0, -2).any(0).nonzero()
        if not is_few.numel():
            return y
        rows = int(is_few[-1]) + 1 if seen.causal else rows
    few_keys = min(FEW_KEYS, k.shape[-2])
    place = torch.sort(~seen.keys, dim=-1, stable=True).indices[..., :few_keys]
    number = torch.arange(few_keys, device=q.device)
    few_mask = (number < seen.keys.sum(-1, keepdim=True))[..., None, :]
    if seen.causal:
        few_mask = few_mask & (place[..., None, :] <= torch.arange(rows, device=q.device)[:, None])
    if mask is not None and mask.dtype != torch.bool:
        mask = mask[..., :1, :].expand(*seen.keys.shape[:2], 1, -1)
        few_mask = restricted(mask.gather(-1, place[..., None, :]), few_mask)
    k, v = (_at(t, place, q.shape[1]) for t in (k, v))
    few = by_scores(q[..., :rows, :], k, v, few_mask, None, how._replace(causal=False))
    few = torch.where(count[..., :rows, None] <= FEW_KEYS, few, y[..., :rows, :])
    return few if rows == y.shape[-2] else torch.cat((few, y[..., rows:, :]), -2)


def _count(keys: Tensor, rows: int, causal: bool) -> Tensor:
    """How many of the keys that may be seen each row sees, shape (B or 1, H or 1, L or 1)."""
    if not causal:
        return keys.sum(-1, keepdim=True)
    return F.pad(keys, (0, max(0, rows - keys.shape[-1])))[..., :rows].cumsum(-1)


def _at(x: Tensor, place: Tensor, heads: int) -> Tensor:
    """Keys or values at places of shape (B or 1, H or 1, few)."""
    if place.shape[1] not in (1, x.shape[1]):
        x = x.repeat_interleave(heads // x.shape[1], 1)
    index = place[..., None].expand(*x.shape[:2], place.shape[-1], x.shape[-1])
    return x.gather(-2, index)


def _as_kernels_read_it(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """An additive mask in q's dtype, where PyTorch's kernels take one of float32 and read it as if
    it had that: beside float64 on a CPU, and beside 16 bits on a GPU (seen with 2.11).
    """
    if mask is None or mask.dtype in (torch.bool, q.dtype):
        return mask
    if q.is_cpu and q.dtype != torch.float64:
        return mask
    lowest = max(torch.finfo(dtype).min for dtype in (mask.dtype, q.dtype))
    return torch.where(reference.is_seen(mask), mask.clamp(lowest, -lowest), -math.inf).to(q.dtype)


def _trusted_kernels(q: Tensor, k: Tensor, v: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without PyTorch's fused kernels for empty tensors on a GPU, which they refuse."""
    if q.is_cuda and not (q.numel() and k.numel() and v.numel()):
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


# ---- the queries' divisors ----


def divide(
    q: Tensor, k: Tensor, seen: Seen, scale: float, tau: float | Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries over their rows' divisors, and keys whose scores differ by a constant in each row."""
    tau = tau_tensor(tau, q)
    scaled, shifted = DividedQueries.apply(q, k, seen.keys, tau, eps, scale, seen.causal)
    return scaled, shifted


class DividedQueries(torch.autograd.Function):
    """The queries' division for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        seen: Tensor | None,
        tau: Tensor,
        eps: float,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `reference.norm_attention.forward`."""
        forward, backward = KERNELS(q)
        scaled, offset, deviation = forward(q, k, seen, tau, eps, scale, causal)
        # A copy of the keys is spared where a look is free, and there is nothing to take off.
        shifted = k if may_be_looked_at(k) and not offset.any() else k - offset
        ctx.call = backward, eps, scale, causal
        ctx.save_for_backward(q, k, seen, tau, deviation)
        ctx.set_materialize_grads(False)
        return scaled, shifted

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Any, ...]:
        """See `reference.norm_attention.backward`."""
        q, k, seen, tau, deviation = ctx.saved_tensors
        kernel, eps, scale, causal = ctx.call
        if grad_q is None:
            grad_q = torch.zeros_like(q)
        wants_q, wants_k, _, wants_tau, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            mask = None if seen is None else seen[..., None, :]
            of_q, of_k, of_tau = _twice_differentiable(
                (wants_q, wants_k, wants_tau), grad_q, grad_k, q, k, mask, causal, scale, tau, eps
            )
        else:
            of_q, of_k, of_divisor = kernel(
                grad_q, grad_k, q, k, seen, deviation, tau, eps, scale, causal
            )
            of_tau = None
            if wants_tau:
                is_tau = (deviation >= tau) & (tau > eps)
                of_tau = torch.where(is_tau, of_divisor, 0).sum()
        found = (of_q if wants_q else None, of_k if wants_k else None)
        return *found, None, of_tau, None, None, None


def _twice_differentiable(
    wants: tuple[bool, bool, bool],
    grad_q: Tensor,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    tau: Tensor,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients that will themselves be differentiated: by the definition, with all scores."""
    scaled = reference.divided(q, k, mask, causal, scale, tau, eps)
    inputs = [t for t, wanted in zip((q, k, tau), wants, strict=True) if wanted]
    found = iter(torch.autograd.grad(scaled, inputs, grad_q, create_graph=True, allow_unused=True))
    of_q, of_k, of_tau = (next(found) if wanted else None for wanted in wants)
    if grad_k is not None:
        of_k = grad_k if of_k is None else of_k + grad_k
    return of_q, of_k, of_tau


# ---- the kernel ops ----


def _forward_fake(
    q: Tensor, k: Tensor, seen: Tensor | None, tau: Tensor, eps: float, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    offset = k.new_empty((*k.shape[:2], 1, k.shape[3]))
    return q.new_empty(q.shape), offset, q.new_empty(q.shape[:-1], dtype=tau.dtype)


def _backward_fake(
    grad_q: Tensor,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    seen: Any,
    deviation: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), deviation.new_empty(deviation.shape)


declare(
    "_norm_attention_forward",
    "(Tensor q, Tensor k, Tensor? seen, Tensor tau, float eps, float scale, bool causal)"
    " -> (Tensor scaled, Tensor offset, Tensor deviation)",
    fake=_forward_fake,
    reference=reference.forward,
    triton=reference.forward,
    libraries=("CPU",),
)
declare(
    "_norm_attention_backward",
    "(Tensor grad_q, Tensor? grad_k, Tensor q, Tensor k, Tensor? seen, Tensor deviation,"
    " Tensor tau, float eps, float scale, bool causal)"
    " -> (Tensor of_q, Tensor of_k, Tensor of_divisor)",
    fake=_backward_fake,
    reference=reference.backward,
    triton=reference.backward,
    libraries=("CPU",),
)
KERNELS = Family("_norm_attention_forward", "_norm_attention_backward")
