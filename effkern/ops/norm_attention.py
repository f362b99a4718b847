"""NormSoftmax attention: the function, and the choice of how it is computed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effkern.ops import attention_without_scores
from effkern.ops._machine import multiplies
from effkern.ops._modes import autocast_is_on, transforms_are_active
from effkern.ops.attention_by_scores import Numbers, by_definition, by_scores
from effkern.ops.attention_without_scores import without_scores
from effkern.ops.norm_attention_checks import check, in_four_dimensions, tells_rows_apart
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
    "NormSoftmax" (COINS 2023). The result is exact, and L x S scores are never held, but with
    dropout on a CPU or beside a mask that tells rows apart, and for a mask that wants a gradient.

    It is computed in one of two ways: by the scores of some rows at a time, or with each query
    divided by its sigma, ``scale sqrt(q_i^T Cov(k) q_i)``, in `scaled_dot_product_attention` with
    the kernels that has. The first is taken on the CPU for at most 2,048 keys, in causal attention
    4,096 (of 16 bits where the processor has no products of them), and everywhere for masks that
    tell rows apart, for L < E / 2 and for at most 8 keys. Memory beyond the inputs is linear in L
    and S.

    Args:
        q: queries, shape (*, L, E); float32, float64, bfloat16 or float16.
        k: keys, shape (*, S, E), of the same dtype; leading dimensions broadcast.
        v: values, shape (*, S, Ev), of the same dtype.
        attn_mask: broadcasting to (*, L, S). Boolean: True takes part. Additive, of float32 or q's
            dtype: entries at or below half its lowest finite value are hidden; others are added
            after the scores were normalised, and sigma is that of the scores without them. On a
            GPU those of padding are rounded to q's dtype.
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
    how = Numbers(causal, scale, tau, eps, dropout_p)
    if transforms_are_active():
        y = by_definition(q, k, v, mask, key_mask, how)
    elif q.numel() and k.numel() and _scores_suit(q, k, mask, causal):
        y = by_scores(q, k, v, mask, key_mask, how)
    else:
        y = without_scores(q, k, v, mask, key_mask, gqa, how)
    return y if y.shape[:-2] == leading else y.reshape(*leading, *y.shape[-2:])


#: Keys up to which one kernel on the CPU does the whole of causal attention, by dtype, and half as
#: many of other: of more, what a block of rows reads of them is too far from the processor. Numbers
#: of 16 bits are widened there, and left to PyTorch where the processor has products of them.
MOST_KEYS = {
    dtype: 4096
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype in (torch.float32, torch.float64) or not multiplies(dtype)
}


def _scores_suit(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether attention goes by its scores, some rows at a time, and not by divided queries.

    It must where a mask tells rows apart, or few keys are seen by all; it is less work where there
    are few rows; and on the CPU there is a kernel that is as fast as PyTorch's attention.
    """
    if mask is not None and tells_rows_apart(mask):
        return True
    if k.shape[-2] <= attention_without_scores.FEW_KEYS or 2 * q.shape[-2] < q.shape[-1]:
        return True
    most_keys = MOST_KEYS.get(q.dtype, 0)
    return q.is_cpu and k.shape[-2] <= (most_keys if causal else most_keys // 2)
