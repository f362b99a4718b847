"""NormSoftmax attention: the function, its gradient, and the ops that divide the queries."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from effkern.backends.reference import norm_attention as reference
from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.backends.reference.norm_attention import restricted
from effkern.ops._declare import Family, declare
from effkern.ops._machine import multiplies
from effkern.ops._modes import autocast_is_on, may_be_looked_at, transforms_are_active
from effkern.ops.attention_by_scores import attention_by_scores
from effkern.ops.norm_attention_checks import Seen, check, in_four_dimensions, read_mask
from effkern.ops.norm_softmax import norm_softmax
from effkern.ops.norm_softmax_checks import tau_of


def norm_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    tau: float | Tensor = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with NormSoftmax in place of softmax.

    ``softmax(x_i / max(min(sigma_i, tau), eps)) v`` where ``x_i = scale k q_i`` are the scores of a
    row and sigma_i their population deviation over the keys that it sees: Jiang et al.,
    "NormSoftmax" (COINS 2023). The result is exact, and no scores are held: sigma_i is
    ``scale sqrt(q_i^T Cov(k) q_i)``, each query is divided, and `scaled_dot_product_attention`
    does the rest with the kernels it has. Memory beyond that is linear in L and S: a copy of q and
    k, and in causal attention an (E, E) matrix for each 64 keys while the kernel runs.

    Rows that see few keys go by the definition: all rows where there are at most 32 keys, and of
    causal attention the first 32. A query may there be all but orthogonal to the keys' differences,
    and dividing it would magnify the rounding of all that is not.

    Without scores go attention without a mask, with ``is_causal``, and for masks that are the same
    for all rows (of size 1 in the dimension before the last: padding). For any other mask, and for
    L < E / 2, sigma is found from the scores of some rows at a time: at most 2^21 scores (or one
    row's), computed once more in the forward pass and once more in the backward pass.

    Args:
        q: queries, shape (*, L, E); float32, float64, bfloat16 or float16.
        k: keys, shape (*, S, E), of the same dtype; leading dimensions broadcast.
        v: values, shape (*, S, Ev), of the same dtype.
        attn_mask: broadcasting to (*, L, S). Boolean: True takes part. Additive, of float32 or q's
            dtype: entries at or below half its lowest finite value are hidden; others are added
            after the scores were normalised, and sigma is that of the scores without them. On a
            GPU they are rounded to q's dtype.
        dropout_p: probability with which a probability becomes zero; applied whenever above 0.
        is_causal: row i sees the keys up to i, counted from the top left.
        scale: of the scores; None: ``1 / sqrt(E)``.
        enable_gqa: whether q may have a multiple of the heads of k and v, which stand in the third
            dimension from the last.
        tau: the temperature, above 0: a number, or a tensor of one element, to which a gradient
            flows.
        eps: the least divisor, at least 0.

    Returns:
        Shape (*, L, Ev), of q's dtype. Rows that see no key are zero and pass no gradient; in rows
        that see one sigma counts as tau. Under autocast computed as
        `scaled_dot_product_attention` is, in autocast's dtype. Under torch.func transforms all
        scores are held.

    Raises:
        TypeError: if an argument that must be a tensor or a number is none.
        ValueError: if tau or eps, as a number, is out of range.
        RuntimeError: if a dtype, shape, device or layout does not fit; the message names the
            argument.
    """
    check(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa, tau, eps)
    return attend(
        q,
        k,
        v,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        tau=tau,
        eps=eps,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None,
    key_mask: Tensor | None = None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    tau: float | Tensor,
    eps: float,
) -> Tensor:
    """`norm_softmax_attention` of checked arguments, with masks that may be combined.

    Args:
        q: as there, and so are the others, but that attn_mask may stand beside is_causal.
        k: as there.
        v: as there.
        attn_mask: as there.
        key_mask: boolean, shape (B, S), for q of shape (B, H, L, E): the keys that may be seen.
        dropout_p: as there.
        is_causal: as there.
        scale: as there.
        enable_gqa: as there.
        tau: as there.
        eps: as there.
    """
    if autocast_is_on(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, attn_mask = (_autocast(t, dtype) for t in (q, k, v, attn_mask))
        with torch.autocast(q.device.type, enabled=False):
            return _attend(
                q, k, v, attn_mask, key_mask, dropout_p, is_causal, scale, enable_gqa, tau, eps
            )
    return _attend(q, k, v, attn_mask, key_mask, dropout_p, is_causal, scale, enable_gqa, tau, eps)


def _autocast(tensor: Any, dtype: torch.dtype) -> Any:
    """As autocast does it: float64 stays."""
    if tensor is None or tensor.dtype in (torch.float64, torch.bool):
        return tensor
    return tensor.to(dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    dropout_p: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    tau: float | Tensor,
    eps: float,
) -> Tensor:
    features = q.shape[-1]
    if scale is None:
        scale = 1 / math.sqrt(features) if features else 1.0
    tau = tau_of(tau, q)
    q, k, v, mask, leading = in_four_dimensions(q, k, v, mask, gqa)
    # Keys that no row sees. (A graph would have to be of more keys than rows, or of fewer.)
    if causal and not torch.compiler.is_compiling() and 0 < q.shape[-2] < k.shape[-2]:
        k, v = (t[..., : q.shape[-2], :] for t in (k, v))
        mask, key_mask = (t if t is None else t[..., : q.shape[-2]] for t in (mask, key_mask))
    how = _Numbers(causal, scale, tau, eps, dropout_p)
    if transforms_are_active():
        y = _by_definition(q, k, v, mask, key_mask, how)
    elif q.numel() and k.numel() and _scores_suit(q, k, mask):
        y = _by_scores(q, k, v, mask, key_mask, how)
    else:
        y = _without_scores(q, k, v, mask, key_mask, gqa, how)
    return y if y.shape[:-2] == leading else y.reshape(*leading, *y.shape[-2:])


class _Numbers(NamedTuple):
    causal: bool
    scale: float
    tau: float | Tensor
    eps: float
    dropout_p: float


#: Keys up to which one kernel on the CPU does the whole of attention, by dtype: of more, what a
#: block of rows reads of them is too far from the processor. Numbers of 16 bits are widened there,
#: and left to PyTorch where the processor has products of them.
MOST_KEYS = {
    dtype: 4096
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype in (torch.float32, torch.float64) or not multiplies(dtype)
}


def _scores_suit(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether attention goes by its scores, some rows at a time, and not by divided queries.

    It must where a mask tells rows apart, or few keys are seen by all; it is less work where there
    are few rows; and on the CPU there is a kernel that is as fast as PyTorch's attention.
    """
    if mask is not None and mask.shape[-2] > 1 and mask.stride(-2) != 0:
        return True
    if k.shape[-2] <= FEW_KEYS or 2 * q.shape[-2] < q.shape[-1]:
        return True
    return q.is_cpu and k.shape[-2] <= MOST_KEYS.get(q.dtype, 0)


def _by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    how: _Numbers,
) -> Tensor:
    """With dropout, or a mask with a gradient, all scores are held, as in PyTorch."""
    wants_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if how.dropout_p > 0 or wants_mask:
        return _by_definition(q, k, v, mask, key_mask, how)
    if key_mask is not None:
        mask = restricted(mask, key_mask[:, None, None, :])
    return attention_by_scores(q, k, v, mask, how.causal, how.scale, how.tau, how.eps)


def _by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    how: _Numbers,
) -> Tensor:
    if key_mask is not None:
        mask = restricted(mask, key_mask[:, None, None, :])
    k, v = (t.repeat_interleave(q.shape[1] // max(t.shape[1], 1), 1) for t in (k, v))
    return reference.attention(q, k, v, mask, *how, softmax=_norm_softmax)[0]


def _norm_softmax(
    x: Tensor, mask: Tensor | None, tau: float | Tensor, eps: float, dim: int
) -> Tensor:
    return norm_softmax(x, dim, tau=tau, eps=eps, mask=mask)


# ---- without scores ----


def _without_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    gqa: bool,
    how: _Numbers,
) -> Tensor:
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
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seen: Seen, how: _Numbers
) -> Tensor:
    """Y with its rows that see few keys by their scores with those, which come before all others
    that any row of their batch and head sees.
    """
    rows = q.shape[-2]
    if seen.keys is None:
        first = min(rows, FEW_KEYS)
        q, k, v = (t[..., :first, :] for t in (q, k, v))
        few = _by_scores(q, k, v, None, None, how)
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
    few = _by_scores(q[..., :rows, :], k, v, few_mask, None, how._replace(causal=False))
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
    acc = accumulation_dtype(q.dtype)
    if isinstance(tau, Tensor):
        tau = tau.to(acc)
    else:
        tau = torch.full((), tau, dtype=acc, device=q.device)
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
