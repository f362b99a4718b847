"""What NormSoftmax attention refuses, in the words of `scaled_dot_product_attention` where it has
some, and how it reads a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.backends.reference.norm_attention import is_seen, restricted, with_causal
from effkern.ops.norm_checks import check_kind
from effkern.ops.norm_softmax_checks import check_eps, check_tau

NAME = "norm_softmax_attention"


def check(
    q: Any, k: Any, v: Any, mask: Any, dropout_p: Any, causal: Any, gqa: Any, tau: Any, eps: Any
) -> None:
    """Raise for the first argument that does not fit.

    Raises:
        TypeError: if an argument that must be a tensor or a number is none.
        ValueError: if tau or eps, as a number, is out of range.
        RuntimeError: if a dtype, shape, device, layout or probability does not fit.
    """
    tensors = {"q": q, "k": k, "v": v}
    for name, value in tensors.items():
        check_kind(NAME, name, value)
        if value.dim() < 2:
            raise RuntimeError(
                f"{NAME}: {name} must have at least 2 dimensions, got shape {tuple(value.shape)}"
            )
        if value.dtype != q.dtype:
            raise RuntimeError(f"{NAME}: {name} must have q's dtype {q.dtype}, got {value.dtype}")
        if value.device != q.device:
            raise RuntimeError(
                f"{NAME}: {name} must be on q's device {q.device}, got {value.device}"
            )
    if q.shape[-1] != k.shape[-1]:
        raise RuntimeError(
            f"{NAME}: k must have q's {q.shape[-1]} features, got shape {tuple(k.shape)}"
        )
    if k.shape[-2] != v.shape[-2]:
        raise RuntimeError(
            f"{NAME}: v must have a row for each of k's {k.shape[-2]} keys, got shape "
            f"{tuple(v.shape)}"
        )
    check_tau(NAME, tau)
    check_eps(NAME, eps)
    if not isinstance(dropout_p, int | float | torch.SymFloat):
        raise TypeError(f"{NAME}: dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(
            f"{NAME}: dropout probability has to be between 0 and 1, but got {dropout_p}"
        )
    if gqa:
        _check_groups(q, k, v)
    if mask is None:
        return
    if causal:
        raise RuntimeError(f"{NAME}: Explicit attn_mask should not be set when is_causal=True")
    check_mask("attn_mask", mask, q)


def check_mask(name: str, mask: Any, q: Tensor) -> None:
    """Raise unless ``mask`` is one by its dtype and device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{NAME}: {name} must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise RuntimeError(
            f"{NAME}: Expected {name} dtype to be bool or float or to match query dtype "
            f"{q.dtype}, but got {mask.dtype}"
        )
    if mask.layout != torch.strided:
        raise RuntimeError(f"{NAME}: {name} must be a dense tensor, got layout {mask.layout}")
    if mask.device != q.device:
        raise RuntimeError(f"{NAME}: {name} must be on q's device {q.device}, got {mask.device}")


def _check_groups(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, value in {"q": q, "k": k, "v": v}.items():
        if value.dim() < 3:
            raise RuntimeError(
                f"{NAME}: with enable_gqa {name} must have a dimension of heads, got shape "
                f"{tuple(value.shape)}"
            )
        heads = value.shape[-3]
        if heads == 0 or q.shape[-3] % heads:
            raise RuntimeError(
                f"{NAME}: Number of heads in key and value must divide the number of heads in "
                f"query, got {q.shape[-3]} in q and {heads} in {name}"
            )


# ---- four dimensions ----


class Heads(NamedTuple):
    """Arguments brought to four dimensions, and the leading ones that the result has.

    Attributes:
        q: shape (B, H, L, E).
        k: shape (B, Hk, S, E).
        v: shape (B, Hv, S, Ev).
        mask: broadcasting to (B, H, L, S), with four dimensions; or None.
        leading: the shape of the result before its last two dimensions.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    leading: torch.Size


def in_four_dimensions(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gqa: bool) -> Heads:
    """Broadcast leading dimensions together, and flatten all but the last of them.

    Raises:
        RuntimeError: if they do not broadcast.
    """
    own = 3 if gqa else 2  # dimensions that each tensor keeps for itself
    leading, *others = (t.shape[:-own] for t in (q, k, v))
    try:
        if any(shape != leading for shape in others):
            leading = torch.broadcast_shapes(leading, *others)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise RuntimeError(
            f"{NAME}: the leading dimensions of q, k and v must broadcast, got shapes {shapes}"
        ) from error
    of_result = torch.Size((*leading, q.shape[-3])) if gqa else leading
    batch = (*of_result[:-1],)
    own_heads = (leading or (1,))[-1]
    q, k, v = (_to_four(t, (*batch, t.shape[-3] if gqa else own_heads)) for t in (q, k, v))
    if mask is not None:
        scores = (*of_result, q.shape[-2], k.shape[-2])
        aligned = zip(reversed(mask.shape), reversed(scores), strict=False)
        if mask.dim() > len(scores) or any(have not in (1, want) for have, want in aligned):
            raise RuntimeError(
                f"{NAME}: attn_mask must broadcast to {scores}, got shape {tuple(mask.shape)}"
            )
        mask = mask.expand(*mask.shape[:-1], k.shape[-2])
        if mask.dim() <= 4 and len(of_result) <= 2:
            mask = mask[(None,) * (4 - mask.dim())]
        else:
            rows = mask.shape[-2] if mask.dim() > 1 else 1
            mask = _to_four(mask, (*batch, mask.shape[-3] if mask.dim() > 2 else 1), rows)
    return Heads(q, k, v, mask, of_result)


def _to_four(tensor: Tensor, leading: tuple[int, ...], rows: int | None = None) -> Tensor:
    if tensor.shape[:-2] == leading and len(leading) == 2 and rows is None:
        return tensor
    rows = tensor.shape[-2] if rows is None else rows
    expanded = tensor.expand(*leading, rows, tensor.shape[-1])
    if len(leading) == 2:
        return expanded
    batch = 1
    for size in leading[:-1]:
        batch *= size
    return expanded.reshape(batch, leading[-1], *expanded.shape[-2:])


# ---- masks ----


class Seen(NamedTuple):
    """Which keys the rows see, in the forms that the parts of attention want.

    Attributes:
        keys: boolean, shape (B or 1, H or 1, S): keys that are hidden from all rows alike; None
            where there are none, or where the mask tells rows apart.
        for_softmax: the mask for `scaled_dot_product_attention`.
        causal: whether row i sees the keys up to i alone.
        some: boolean, broadcasting to (B, H, L, 1): rows that see a key; None where all do, or
            where `scaled_dot_product_attention` gives the others zeros.
    """

    keys: Tensor | None
    for_softmax: Tensor | None
    causal: bool
    some: Tensor | None


def tells_rows_apart(mask: Tensor) -> bool:
    """Whether a mask has a row for each row of scores, and is not one that was expanded."""
    return mask.shape[-2] > 1 and mask.stride(-2) != 0


def read_mask(mask: Tensor | None, keys: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Seen:
    """Find out what is hidden from all rows alike.

    Args:
        mask: of four dimensions, boolean or additive, or None.
        keys: boolean, shape (B, S): which keys may be seen, beside ``mask``; or None.
        causal: as `Seen` has it.
        q: the queries, shape (B, H, L, E).
        k: the keys, shape (B, Hk, S, E).
    """
    of_keys = None if keys is None else keys[:, None]
    for_softmax = None if keys is None else keys[:, None, None, :]
    general = None
    if mask is not None:
        if not tells_rows_apart(mask):
            mask = mask[..., :1, :]  # expanded, as transformers' masks of padding are
        seen = is_seen(mask.detach())
        if mask.shape[-2] == 1:
            of_keys = seen[..., 0, :] if of_keys is None else of_keys & seen[..., 0, :]
            for_softmax = of_keys[..., None, :]
            if mask.dtype != torch.bool:
                for_softmax = restricted(mask, for_softmax)
        else:
            general = for_softmax = mask if for_softmax is None else restricted(mask, for_softmax)
        if general is not None:
            of_keys = None
    if for_softmax is not None and causal:
        for_softmax = with_causal(for_softmax, True, q.shape[-2], k.shape[-2], q)
    some = None
    if for_softmax is not None and not (q.is_cpu and _is_zeroed_by_torch(for_softmax, general)):
        some = is_seen(for_softmax.detach()).any(-1, keepdim=True)
        # What sees nothing is given something to see, and its result is zeroed after.
        if for_softmax.dtype == torch.bool:
            for_softmax = for_softmax | ~some
        else:
            for_softmax = torch.where(some, for_softmax, 0)
    return Seen(of_keys, for_softmax, causal, some)


def _is_zeroed_by_torch(for_softmax: Tensor, general: Tensor | None) -> bool:
    """Whether rows that see nothing get zeros and pass none back, in PyTorch's CPU kernels: where
    all is False or -inf, but not finfo.min.
    """
    return for_softmax.dtype == torch.bool or general is None
