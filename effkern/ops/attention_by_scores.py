"""NormSoftmax attention by its scores, some rows at a time: its kernel ops and its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.backends.reference import attention_by_scores as reference
from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.backends.reference.norm_attention import attention, restricted
from effkern.backends.reference.norm_softmax import mask_in
from effkern.ops._declare import Family, Implementation, declare
from effkern.ops.norm_softmax import norm_softmax
from effkern.ops.norm_softmax_checks import tau_tensor

# ---- the kernel ops ----


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_tau = q.new_empty(q.shape[:-1] if wants_tau else 0, dtype=tau.dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), of_tau


def _of_triton(function: Implementation) -> Implementation:
    """The reference with Triton's softmax between PyTorch's products."""

    def forward(x: Tensor, mask: Tensor | None, tau: Tensor, *rest: Any) -> Tensor:
        return torch.ops.effkern._norm_softmax_forward.triton(x, mask, tau, 0.0, *rest)

    def backward(
        grad: Tensor, x: Tensor, mask: Tensor | None, tau: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.effkern._norm_softmax_backward.triton(grad, x, mask, tau, 0.0, *rest)

    return partial(function, softmax=reference.Softmax(forward, backward))


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor tau, float eps, float scale, bool causal"
)
declare(
    "_attention_by_scores_forward",
    f"({_ARGUMENTS}) -> Tensor",
    fake=_forward_fake,
    reference=reference.forward,
    triton=_of_triton(reference.forward),
    libraries=("CPU",),
)
declare(
    "_attention_by_scores_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool wants_tau)"
    " -> (Tensor of_q, Tensor of_k, Tensor of_v, Tensor of_tau)",
    fake=_backward_fake,
    reference=reference.backward,
    triton=_of_triton(reference.backward),
    libraries=("CPU",),
)
KERNELS = Family("_attention_by_scores_forward", "_attention_by_scores_backward")

# ---- the function ----


class Numbers(NamedTuple):
    """Arguments of attention, as `effkern.nn.functional.norm_softmax_attention` has them."""

    causal: bool
    scale: float
    tau: float | Tensor
    eps: float
    dropout_p: float


def by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    how: Numbers,
) -> Tensor:
    """NormSoftmax attention of checked arguments, some rows at a time. With dropout, or a mask with
    a gradient, all scores are held, as in PyTorch.

    Args:
        q: shape (B, H, L, E), not empty.
        k: shape (B, Hk, S, E), not empty, where Hk divides H.
        v: shape (B, Hv, S, Ev), where Hv divides H.
        mask: boolean or additive, four dimensions that broadcast to (B, H, L, S), the last of them
            S; or None.
        key_mask: boolean, shape (B, S): the keys that may be seen; or None.
        how: the numbers.

    Returns:
        Shape (B, H, L, Ev).
    """
    wants_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if how.dropout_p > 0 or wants_mask:
        return by_definition(q, k, v, mask, key_mask, how)
    if key_mask is not None:
        mask = restricted(mask, key_mask[:, None, None, :])
    acc = accumulation_dtype(q.dtype)
    if mask is not None and mask.dtype not in (torch.bool, acc):
        mask = mask_in(mask, acc)
    if k.shape[1] != v.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    tau = tau_tensor(how.tau, q)
    return AttentionByScores.apply(q, k, v, mask, tau, how.eps, how.scale, how.causal)


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    how: Numbers,
) -> Tensor:
    """The same with all scores, in operations that autograd follows."""
    if key_mask is not None:
        mask = restricted(mask, key_mask[:, None, None, :])
    k, v = (t.repeat_interleave(q.shape[1] // max(t.shape[1], 1), 1) for t in (k, v))
    return attention(q, k, v, mask, *how, softmax=_norm_softmax)[0]


def _norm_softmax(
    x: Tensor, mask: Tensor | None, tau: float | Tensor, eps: float, dim: int
) -> Tensor:
    return norm_softmax(x, dim, tau=tau, eps=eps, mask=mask)


class AttentionByScores(torch.autograd.Function):
    """`by_scores` for autograd. Nothing is kept for the backward pass but its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        tau: Tensor,
        eps: float,
        scale: float,
        causal: bool,
    ) -> Tensor:
        """See `reference.forward`."""
        forward, backward = KERNELS(q)
        ctx.call = backward, eps, scale, causal
        ctx.save_for_backward(q, k, v, mask, tau)
        return forward(q, k, v, mask, tau, eps, scale, causal)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """See `reference.backward`."""
        q, k, v, mask, tau = ctx.saved_tensors
        kernel, eps, scale, causal = ctx.call
        *wants, _, wants_tau, _, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            found = _twice_differentiable(
                (*wants, wants_tau), grad, q, k, v, mask, causal, scale, tau, eps
            )
        else:
            *found, of_tau = kernel(grad, q, k, v, mask, tau, eps, scale, causal, wants_tau)
            found.append(of_tau.sum() if wants_tau else None)
        of_q, of_k, of_v, of_tau = found
        return of_q, of_k, of_v, None, of_tau, None, None, None


def _twice_differentiable(
    wants: tuple[bool, ...],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *numbers: Any,
) -> list[Tensor | None]:
    """Gradients that will themselves be differentiated: by the definition, with all scores."""
    *qkv, tau = (
        t if wanted else t.detach() for t, wanted in zip((q, k, v, numbers[2]), wants, strict=True)
    )
    given = [t for t, wanted in zip((*qkv, tau), wants, strict=True) if wanted]
    keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in qkv[1:])
    causal, scale, _, eps = numbers
    y, _ = attention(qkv[0], keys, values, mask, causal, scale, tau, eps, 0.0)
    found = iter(torch.autograd.grad(y, given, grad, create_graph=True, allow_unused=True))
    return [next(found) if wanted else None for wanted in wants]
