"""NormSoftmax attention and its gradients by the definition, the scores of some rows at a time.

Of ``y = p v``, ``p = norm_softmax(x)``, ``x = scale q k^T``:

    grad v = p^T g,    grad q = scale dx k,    grad k = scale dx^T q,

dx the gradient of `norm_softmax` for that of p, ``g v^T``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.backends.reference import norm_softmax
from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.backends.reference.norm_attention import is_seen, offset, with_causal

#: Scores that are held at a time: of a device with memory of its own, which has many processors.
SCORES = {"cpu": 1 << 21}
SCORES_ELSEWHERE = 1 << 24


class Softmax(NamedTuple):
    """`effkern.backends.reference.norm_softmax`'s functions of those names, or a kernel's."""

    norm_softmax: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor]]


REFERENCE = Softmax(norm_softmax.norm_softmax, norm_softmax.backward)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tau: Tensor,
    eps: float,
    scale: float,
    causal: bool,
    softmax: Softmax = REFERENCE,
) -> Tensor:
    """The result of attention.

    Args:
        q: shape (B, H, L, E), float32, float64, bfloat16 or float16.
        k: shape (B, Hk, S, E), of the same dtype, where Hk divides H.
        v: shape (B, Hk, S, Ev), of the same dtype.
        mask: boolean or additive of the accumulation dtype, four dimensions that broadcast to (B,
            H, L, S), the last of them S; or None.
        tau: 0-dim, of the accumulation dtype.
        eps: the least divisor.
        scale: of the scores.
        causal: whether row i sees the keys up to i alone.
        softmax: what normalises scores.

    Returns:
        Shape (B, H, L, Ev), contiguous, of q's dtype.
    """
    y = q.new_empty((*q.shape[:-1], v.shape[-1]))
    keys, values = _wide(k, mask, causal), v.to(accumulation_dtype(v.dtype))
    for block in _blocks(q, k):
        x = block.folded(q) @ block.of_keys(keys).transpose(-2, -1) * scale
        p = softmax.norm_softmax(block.apart(x), block.mask(mask, causal, k), tau, eps, 3)
        y[block.of_rows] = block.apart(block.together(p) @ block.of_keys(values)).to(y.dtype)
    return y


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tau: Tensor,
    eps: float,
    scale: float,
    causal: bool,
    wants_tau: bool,
    softmax: Softmax = REFERENCE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `forward`.

    Args:
        grad: with respect to the result.
        q: as forward had it, and so are k, v, mask, tau, eps, scale, causal and softmax.
        k: of forward.
        v: of forward.
        mask: of forward.
        tau: of forward.
        eps: of forward.
        scale: of forward.
        causal: of forward.
        wants_tau: whether that of tau is computed.
        softmax: of forward.

    Returns:
        Of q, k and v, in their dtype, contiguous; and each row's share of tau's, shape (B, H, L),
        in the accumulation dtype, or an empty tensor.
    """
    keys, values = _wide(k, mask, causal), v.to(accumulation_dtype(v.dtype))
    of_q, of_k, of_v = q.new_empty(q.shape), torch.zeros_like(keys), torch.zeros_like(values)
    of_tau = keys.new_empty(q.shape[:-1] if wants_tau else 0)
    for block in _blocks(q, k):
        k_, v_, q_, g = (
            block.of_keys(keys),
            block.of_keys(values),
            block.folded(q),
            block.folded(grad),
        )
        x = block.apart(q_ @ k_.transpose(-2, -1) * scale)
        sees = block.mask(mask, causal, k)
        p = block.together(softmax.norm_softmax(x, sees, tau, eps, 3))
        of_p = block.apart(g @ v_.transpose(-2, -1))
        of_x, of_rows = softmax.backward(of_p, x, sees, tau, eps, 3, True, wants_tau)
        of_x = block.together(of_x) * scale
        of_q[block.of_rows] = block.apart(of_x @ k_).to(q.dtype)
        block.of_keys(of_k).add_(of_x.transpose(-2, -1) @ q_)
        block.of_keys(of_v).add_(p.transpose(-2, -1) @ g)
        if wants_tau:
            of_tau[block.of_rows] = of_rows.view(x.shape[:-1])
    return of_q, of_k.to(k.dtype).contiguous(), of_v.to(v.dtype).contiguous(), of_tau


def _wide(k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Keys in the accumulation dtype, less what they share far from the origin: it would cost
    scores digits. Zeros where no row sees them.
    """
    seen = seen_by_any(mask, k)
    keys = k.to(accumulation_dtype(k.dtype))
    keys = keys - offset(keys, seen, causal)
    return keys if seen is None else keys.masked_fill(~seen[..., None], 0)


def seen_by_any(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """The keys that some row sees, shape (B or 1, Hk or 1, S)."""
    if mask is None:
        return None
    seen = is_seen(mask).any(-2)
    if seen.shape[1] not in (1, k.shape[1]):
        seen = seen.unflatten(1, (k.shape[1], -1)).any(2)
    return seen


class _Block(NamedTuple):
    """Some batches, or some heads of one, or some rows of one head of keys."""

    batches: slice
    key_heads: slice
    rows: slice
    group: int

    @property
    def of_rows(self) -> tuple[slice, slice, slice]:
        heads = slice(self.key_heads.start * self.group, self.key_heads.stop * self.group)
        return self.batches, heads, self.rows

    def of_keys(self, x: Tensor) -> Tensor:
        return x[self.batches, self.key_heads]

    def folded(self, x: Tensor) -> Tensor:
        """Of queries or gradients: all rows that go with a head of keys, one after the other."""
        return self.together(x[self.of_rows].to(accumulation_dtype(x.dtype)))

    def together(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.group)).flatten(2, 3)

    def apart(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.group, -1)).flatten(1, 2)

    def mask(self, mask: Tensor | None, causal: bool, k: Tensor) -> Tensor | None:
        if mask is not None:
            for dim, part in enumerate(self.of_rows):
                if mask.shape[dim] > 1:
                    mask = mask[(slice(None),) * dim + (part,)]
        rows = self.rows.stop - self.rows.start
        return with_causal(mask, causal, rows, k.shape[-2], k, first=self.rows.start)


def _blocks(q: Tensor, k: Tensor) -> Iterator[_Block]:
    """As many scores together as may be held, at least those of one row of each head of a group."""
    batch, heads, rows, _ = q.shape
    key_heads = k.shape[1]
    group = heads // key_heads
    limit = SCORES.get(q.device.type, SCORES_ELSEWHERE)
    of_a_row = group * k.shape[-2]
    rows_at_a_time = min(rows, max(1, limit // of_a_row))
    heads_at_a_time = min(key_heads, max(1, limit // (of_a_row * rows)))
    batches_at_a_time = min(batch, max(1, limit // (of_a_row * rows * key_heads)))
    for b in _slices(batch, batches_at_a_time):
        for h in _slices(key_heads, heads_at_a_time):
            for r in _slices(rows, rows_at_a_time):
                yield _Block(b, h, r, group)


def _slices(size: int, step: int) -> Iterator[slice]:
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))
