"""The definition of NormSoftmax attention in plain PyTorch, and the deviations of its rows without
their scores.

``softmax(x_i / max(min(sigma_i, tau), eps) + bias_i) v`` with ``x_i = scale * K q_i`` and sigma_i
the population deviation of x_i over the keys that row i sees. Since x_i is linear in q_i,

    sigma_i^2 = scale^2 q_i^T Cov_i q_i,    Cov_i the covariance of the keys that row i sees,

so that a row's deviation needs no scores, and dividing q_i by it divides them all. With
``w_i = 2 scale^2 h_i / n_i``, h_i the gradient with respect to sigma_i^2 and mu_i the mean of the
n_i keys,

    grad q_i = w_i sum_j (k_j - mu_i) (q_i . (k_j - mu_i))
    grad k_j = sum_i w_i q_i (q_i . (k_j - mu_i)).

Rows that see fewer than two keys have the deviation infinity, which counts as tau and passes no
gradient. The covariance and its quadratic form are of float64: where one key is far from the others
(as those of attention sinks are) and a query nearly orthogonal to it, large terms cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.backends.reference.norm_softmax import divisor as safe_divisor
from effkern.backends.reference.norm_softmax import norm_softmax

#: Keys that a causal prefix grows by at a time.
CHUNK = 64


def is_seen(mask: Tensor) -> Tensor:
    """Where a mask lets a row see a key: True, or above half the dtype's lowest finite value."""
    return mask if mask.dtype == torch.bool else ~(mask <= torch.finfo(mask.dtype).min / 2)


def with_causal(
    mask: Tensor | None, causal: bool, rows: int, keys: int, like: Tensor, first: int = 0
) -> Tensor | None:
    """One mask that hides what ``mask`` does and, in causal attention, what comes later; of
    ``rows`` rows from the ``first`` on.
    """
    if not causal:
        return mask
    earlier = torch.ones(rows, keys, dtype=torch.bool, device=like.device).tril(first)
    return restricted(mask, earlier)


def restricted(mask: Tensor | None, seen: Tensor) -> Tensor:
    """One mask that hides what ``mask`` does and what the boolean ``seen`` does."""
    if mask is None:
        return seen
    if mask.dtype == torch.bool:
        return mask & seen
    return torch.where(seen, mask, -math.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    tau: float | Tensor,
    eps: float,
    dropout_p: float,
    softmax: Callable[..., Tensor] = norm_softmax,
) -> tuple[Tensor, Tensor]:
    """The definition, with all scores; differentiable to any order, and under torch.func.

    Args:
        q: shape (*, L, E).
        k: shape (*, S, E).
        v: shape (*, S, Ev).
        mask: boolean or additive, broadcasting to (*, L, S), or None.
        causal: whether row i sees the keys up to i alone.
        scale: of the scores.
        tau: the temperature.
        eps: the least divisor.
        dropout_p: of the probabilities.
        softmax: what computes `effkern.backends.reference.norm_softmax.norm_softmax`.

    Returns:
        The result, shape (*, L, Ev), and the probabilities after dropout, shape (*, L, S), in the
        dtype of q.
    """
    acc = accumulation_dtype(q.dtype)
    scores = q.to(acc) @ k.to(acc).transpose(-2, -1) * scale
    mask = with_causal(mask, causal, scores.shape[-2], scores.shape[-1], scores)
    weights = softmax(scores, mask, tau, eps, -1)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return (weights @ v.to(acc)).to(q.dtype), weights.to(q.dtype)


def divided(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    tau: Tensor,
    eps: float,
) -> Tensor:
    """Queries over their rows' divisors by the definition; differentiable to any order."""
    acc = accumulation_dtype(q.dtype)
    wide = q.to(acc)
    scores = wide @ _of_every_head(k.to(acc), q).transpose(-2, -1) * scale
    mask = with_causal(mask, causal, scores.shape[-2], scores.shape[-1], scores)
    seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else is_seen(mask)
    count = seen.expand(scores.shape).sum(-1, keepdim=True)
    scores = torch.where(seen, scores, 0)
    mean = scores.sum(-1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(seen, scores - mean, 0).square().sum(-1, keepdim=True)
    return (wide / safe_divisor(squares / count.clamp(min=1), count, tau, eps)).to(q.dtype)


def divisor(deviation: Tensor, tau: Tensor, eps: float) -> Tensor:
    """``max(min(sigma, tau), eps)``."""
    return torch.minimum(deviation, tau.to(deviation.dtype)).clamp(min=eps)


# ---- keys that are hidden from all rows alike, and causal prefixes ----


def forward(
    q: Tensor, k: Tensor, seen: Tensor | None, tau: Tensor, eps: float, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries divided by their rows' deviations, an offset of the keys, and the deviations.

    An offset moves a row's scores together, so that their softmax stays. Where keys are far from
    the origin, beside their spread, `offset` is to be taken off: it would cost digits, which a
    divisor as small as eps magnifies.

    Args:
        q: shape (B, H, L, E), float32, float64, bfloat16 or float16.
        k: shape (B, Hk, S, E), of the same dtype, where Hk divides H.
        seen: boolean, shape (B or 1, Hk or 1, S): the keys that may be seen; None: all.
        tau: 0-dim.
        eps: the least divisor.
        scale: of the scores.
        causal: whether row i sees the keys up to i alone.

    Returns:
        q divided; the offset, shape (B, Hk, 1, E), in k's dtype; the deviations, shape (B, H, L),
        in the accumulation dtype.
    """
    acc = accumulation_dtype(q.dtype)
    keys = _centred(k.double(), seen)
    variance, count = _variance(q.double(), *_widened(keys, seen, q, causal), causal)
    deviation = variance.clamp(min=0).sqrt() * abs(scale)
    deviation = deviation.masked_fill(count < 2, math.inf).to(acc)
    scaled = _narrowed(q.to(acc) / divisor(deviation, tau, eps)[..., None], q.dtype)
    return scaled, offset(k, seen, causal), deviation


def offset(k: Tensor, seen: Tensor | None, causal: bool) -> Tensor:
    """What is taken off the keys of each head, shape (B, Hk, 1, E): zeros, unless they lie together
    far from the origin.

    That is the mean of the keys that are seen, where it is more than twice as long as the keys'
    deviation from it. In causal attention nothing may depend on a later key, and only the first two
    are asked, for a row that sees but one does not depend on it: the first, where both are more
    than four times as long as their difference. (A first key of its own, as those of attention
    sinks are, must not be taken off the others; in 16 bits none is, for two may be alike.)
    """
    if causal and k.dtype not in (torch.float32, torch.float64):
        return torch.zeros_like(k[..., :1, :])
    found = _offset(k.to(accumulation_dtype(k.dtype)), seen, causal).to(k.dtype)
    return found if seen is None else torch.where(seen.any(-1)[..., None, None], found, 0)


def _offset(k: Tensor, seen: Tensor | None, causal: bool) -> Tensor:
    first = _key_at(k, seen, 0)
    if causal:
        second = _key_at(k, seen, 1)
        shorter = torch.minimum(_squared_length(first), _squared_length(second))
        return torch.where(shorter > 16 * _squared_length(first - second), first, 0)
    rest = _centred(k, seen)
    count = k.shape[-2] if seen is None else seen.sum(-1)[..., None, None].clamp(min=1)
    mean = rest.sum(-2, keepdim=True) / count
    about = rest - mean
    if seen is not None:
        about = about.masked_fill(~seen[..., None], 0)
    spread = _squared_length(about).sum(-2, keepdim=True) / count
    mean = first + mean
    return torch.where(_squared_length(mean) > 4 * spread, mean, 0)


def backward(
    grad_q: Tensor,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    seen: Tensor | None,
    deviation: Tensor,
    tau: Tensor,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `forward`.

    Args:
        grad_q: with respect to the divided queries.
        grad_k: with respect to the keys less the offset, or None; what passes through the offset
            is left out, for the softmax's gradients sum to zero over a row's keys.
        q: as forward had it, and so are k, seen, tau, eps, scale and causal.
        k: of forward.
        seen: of forward.
        deviation: as forward returned it.
        tau: of forward.
        eps: of forward.
        scale: of forward.
        causal: of forward.

    Returns:
        The gradients of q and k, in their dtype, and of each row's divisor, shape (B, H, L), in
        the accumulation dtype.
    """
    acc = accumulation_dtype(q.dtype)
    of_queries, of_divisor, h = _through_the_divisor(grad_q.to(acc), q.to(acc), deviation, tau, eps)
    of_variance_q, of_variance_k = _variance_backward(
        q.double(),
        h.double() * (2 * scale**2),
        *_widened(_centred(k.double(), seen), seen, q, causal),
        causal,
    )
    total_k = _summed(of_variance_k, k, causal)
    if grad_k is not None:
        total_k = total_k + grad_k.to(acc)
    if seen is not None:
        total_k = total_k.masked_fill(~seen[..., None], 0)
    return (
        (of_queries + of_variance_q).to(q.dtype).contiguous(),
        total_k.to(k.dtype).contiguous(),
        of_divisor,
    )


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float16 ends at 65,504, and a query divided by eps may be larger: no infinity comes of it."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = torch.where(x.isfinite(), x.clamp(-limit, limit), x)
    return x.to(dtype).contiguous()


def _through_the_divisor(
    grad: Tensor, q: Tensor, deviation: Tensor, tau: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``q / max(min(sigma, tau), eps)`` with respect to q, to each row's divisor,
    and to each row's variance: nothing unless sigma is the divisor.
    """
    by = divisor(deviation, tau, eps)
    of_divisor = -(grad * q).sum(-1) / by.square()
    is_sigma = (deviation >= eps) & (deviation < tau) & (deviation > 0)
    of_variance = torch.where(is_sigma, of_divisor / (2 * by), 0)
    return grad / by[..., None], of_divisor, of_variance


def _squared_length(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def _key_at(k: Tensor, seen: Tensor | None, n: int) -> Tensor:
    """The n-th key that may be seen, shape (B, Hk, 1, E); the first key where there are fewer."""
    if seen is None:
        return k[..., min(n, k.shape[-2] - 1) :, :][..., :1, :]
    is_it = seen & (seen.cumsum(-1) == n + 1)
    place = is_it.to(torch.uint8).argmax(-1)[..., None, None]
    return k.gather(-2, place.expand(*k.shape[:2], 1, k.shape[-1]))


def _centred(k: Tensor, seen: Tensor | None) -> Tensor:
    """Keys less the first that may be seen; zero where hidden."""
    rest = k - _key_at(k, seen, 0)
    return rest if seen is None else rest.masked_fill(~seen[..., None], 0)


def _widened(keys: Tensor, seen: Tensor | None, q: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The keys of every query head, shape (B, H, S, E), and which are seen, shape (B, H, S).

    In causal attention S is L here: keys that no row sees are cut off, and hidden ones added.
    """
    if seen is None:
        seen = torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device)
    seen = seen.expand(keys.shape[:-1])
    if causal:
        missing = q.shape[-2] - keys.shape[-2]
        keys = torch.nn.functional.pad(keys, (0, 0, 0, missing))
        seen = torch.nn.functional.pad(seen, (0, missing))
    group = q.shape[1] // keys.shape[1]
    return keys.repeat_interleave(group, 1), seen.repeat_interleave(group, 1)


def _summed(of_keys: Tensor, k: Tensor, causal: bool) -> Tensor:
    """What `_widened` spread over query heads and rows."""
    if causal:
        of_keys = torch.nn.functional.pad(of_keys, (0, 0, 0, k.shape[-2] - of_keys.shape[-2]))
    return of_keys.unflatten(1, (k.shape[1], -1)).sum(2)


def _variance(q: Tensor, keys: Tensor, seen: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """``q_i^T Cov_i q_i``, and how many keys each row sees."""
    if not causal:
        keys, count = _about_the_mean(keys, seen)
        moments = keys.transpose(-2, -1) @ keys
        return ((q @ moments) * q).sum(-1) / count.clamp(min=1), count.expand(q.shape[:-1])
    prefix = _Prefix(q, keys, seen)
    count = prefix.count
    squares = ((prefix.q @ prefix.moments) * prefix.q).sum(-1) + (
        prefix.before * prefix.mean.square() + prefix.centred.square().sum(-1)
    )
    variance = squares / count.clamp(min=1)
    rows = q.shape[-2]
    return variance.flatten(-2)[..., :rows], count.flatten(-2)[..., :rows]


def _variance_backward(
    q: Tensor, h: Tensor, keys: Tensor, seen: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of `_variance` with respect to q and the keys, for ``h`` twice that of the
    variance.
    """
    if not causal:
        keys, count = _about_the_mean(keys, seen)
        w = (h / count.clamp(min=1))[..., None]
        weighted = w * q
        of_queries = weighted @ (keys.transpose(-2, -1) @ keys)
        return of_queries, keys @ (q.transpose(-2, -1) @ weighted)
    prefix = _Prefix(q, keys, seen)
    w = (_in_chunks(h, 1) / prefix.count.clamp(min=1))[..., None]
    weighted = w * prefix.q
    of_queries = weighted @ prefix.moments + w * (prefix.centred @ prefix.keys)
    # Later chunks' rows see all of a chunk: their sums over rows, of q q^T and of q (q . mu).
    outer = prefix.q.transpose(-2, -1) @ weighted
    offset = prefix.mean_before[..., None, :] @ prefix.q.transpose(-2, -1)  # q . (mean before)
    offset = offset.squeeze(-2) + prefix.mean
    about = (weighted * offset[..., None]).sum(-2)
    later_outer, later_about = (_exclusive_suffix(x) for x in (outer, about))
    absolute = prefix.keys + prefix.mean_before[..., None, :]
    of_keys = absolute @ later_outer - later_about[..., None, :]
    of_keys = of_keys + prefix.centred.transpose(-2, -1) @ weighted
    of_keys = of_keys.masked_fill(~prefix.seen[..., None], 0)
    rows = q.shape[-2]
    return of_queries.flatten(-3, -2)[..., :rows, :], of_keys.flatten(-3, -2)[..., :rows, :]


def _about_the_mean(keys: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Keys less the mean of those that are seen, zero where hidden, and their number."""
    count = seen.sum(-1, keepdim=True)
    mean = keys.sum(-2, keepdim=True) / count.clamp(min=1)[..., None]
    return (keys - mean).masked_fill(~seen[..., None], 0), count


def _in_chunks(x: Tensor, features: int) -> Tensor:
    """The dimension of rows, before the last or the last, as chunks; filled up with zeros."""
    dim = x.dim() - features
    missing = -x.shape[dim] % CHUNK
    padding = (0, 0) * (features - 1) + (0, missing)
    return torch.nn.functional.pad(x, padding).unflatten(dim, (-1, CHUNK))


def _exclusive_prefix(x: Tensor) -> Tensor:
    """Sums over the chunks before each, of which nothing later is a part."""
    before = torch.nn.functional.pad(x[:, :, :-1], (0, 0) * (x.dim() - 3) + (1, 0))
    return before.cumsum(2)


def _exclusive_suffix(x: Tensor) -> Tensor:
    """Sums over the chunks after each."""
    return x.sum(2, keepdim=True) - x.cumsum(2)


class _Prefix:
    """What each row of causal attention sees, chunk by chunk: (B, H, chunks, CHUNK, ...).

    Attributes:
        q: the queries.
        seen: which keys may be seen.
        before: how many keys the chunks before hold.
        count: how many keys a row sees.
        mean_before: the mean of the keys before the chunk.
        moments: the sum over the keys before of (k - mean_before)(k - mean_before)^T.
        keys: the chunk's keys less mean_before, zero where hidden.
        mean: the mean of q . (k - mean_before) over all the keys that the row sees.
        centred: q . (k - mean_before) less that mean, for the chunk's own keys; zero where hidden.
    """

    def __init__(self, q: Tensor, keys: Tensor, seen: Tensor) -> None:
        self.q, keys = _in_chunks(q, 2), _in_chunks(keys, 2)
        self.seen = _in_chunks(seen, 1)
        counts = self.seen.sum(-1)
        before = (counts.cumsum(-1) - counts)[..., None]
        self.before = before
        self.count = before + self.seen.cumsum(-1)
        sums = _exclusive_prefix(keys.sum(-2))
        products = _exclusive_prefix(keys.transpose(-2, -1) @ keys)
        mean = sums / before.clamp(min=1)
        self.moments, self.mean_before = products - mean[..., :, None] * sums[..., None, :], mean
        own = self.seen[..., None]
        self.keys = (keys - self.mean_before[..., None, :]).masked_fill(~own, 0)
        visible = (
            self.seen[..., None, :]
            & torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
        )
        scores = (self.q @ self.keys.transpose(-2, -1)).masked_fill(~visible, 0)
        self.mean = scores.sum(-1) / self.count.clamp(min=1)
        self.centred = (scores - self.mean[..., None]).masked_fill(~visible, 0)


def _of_every_head(keys: Tensor, q: Tensor) -> Tensor:
    return keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
