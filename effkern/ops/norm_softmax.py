"""NormSoftmax: its kernel ops, its gradient, the function and its public op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference import norm_softmax as reference
from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.ops._declare import Family, declare, declare_public, imported_at_first_call
from effkern.ops._modes import transforms_are_active
from effkern.ops.norm_softmax_checks import check, tau_of

# ---- the kernel ops ----
#
# The temperature is ``tau``, a tensor of one number of the accumulation dtype, or without one
# ``tau_value``. A mask is bool, of x's dtype or of the accumulation dtype.


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _forward(
    x: Tensor, mask: Tensor | None, tau: Tensor | None, tau_value: float, eps: float, dim: int
) -> Tensor:
    return reference.norm_softmax(x, mask, tau_value if tau is None else tau, eps, dim)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    eps: float,
    dim: int,
    wants_x: bool,
    wants_tau: bool,
) -> tuple[Tensor, Tensor]:
    rows: Any = 1
    for each, size in enumerate(x.shape):
        rows = rows * (1 if each == dim else size)
    acc = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape if wants_x else 0), x.new_empty(rows if wants_tau else 0, dtype=acc)


def _backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    eps: float,
    dim: int,
    wants_x: bool,
    wants_tau: bool,
) -> tuple[Tensor, Tensor]:
    one = tau_value if tau is None else tau
    return reference.backward(grad, x, mask, one, eps, dim, wants_x, wants_tau)


_ARGUMENTS = "Tensor x, Tensor? mask, Tensor? tau, float tau_value, float eps, int dim"
_MODULE = "effkern.backends.triton.norm_softmax"
declare(
    "_norm_softmax_forward",
    f"({_ARGUMENTS}) -> Tensor",
    fake=_forward_fake,
    reference=_forward,
    triton=imported_at_first_call(f"{_MODULE}:forward"),
)
declare(
    "_norm_softmax_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool wants_x, bool wants_tau)"
    " -> (Tensor grad_x, Tensor grad_tau)",
    fake=_backward_fake,
    reference=_backward,
    triton=imported_at_first_call(f"{_MODULE}:backward"),
)
KERNELS = Family("_norm_softmax_forward", "_norm_softmax_backward")

# ---- the function ----


def norm_softmax(
    x: Tensor,
    dim: int = -1,
    *,
    tau: float | Tensor = 1.0,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """The softmax of ``x / max(min(sigma, tau), eps)``, sigma the standard deviation along ``dim``.

    NormSoftmax of Jiang et al. (COINS 2023). Sigma is the population's, over the visible entries;
    where there are fewer than two it counts as tau. A row that is constant gives a uniform
    distribution, a row without a visible entry zeros.

    Args:
        x: of any shape; float32, float64, bfloat16 or float16. Entries that shall not take part are
            hidden by ``mask``, not by -inf.
        dim: the dimension of the distributions.
        tau: the temperature, above 0: a number, or a tensor of one element, to which a gradient
            flows: ``-sum(g x) / tau^2`` of rows with sigma >= tau > eps, g the gradient of the
            normalised logits.
        eps: the least divisor, at least 0.
        mask: broadcastable to x's shape. Boolean: True takes part. Of a floating dtype: entries at
            or below half its lowest finite number are hidden, others are added to the normalised
            logits, and sigma is that of x without them. A gradient flows to them.

    Returns:
        y, contiguous, of x's shape and dtype; zeros at hidden entries. Under CUDA autocast computed
        in float32, as PyTorch's softmax.

    Raises:
        TypeError: if an argument that must be a tensor or a number is none.
        IndexError: if x has no such dimension.
        ValueError: if tau or eps, as a number, is out of range.
        RuntimeError: if a dtype, shape, device or layout does not fit; the message names the
            argument.
    """
    dim = check("norm_softmax", x, dim, tau, eps, mask)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        x = x.float()
    tau = tau_of(tau, x)
    if transforms_are_active():
        # torch.func differentiates and maps the plain formula, to any order and in forward mode.
        return reference.norm_softmax(x, mask, tau, eps, dim)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (isinstance(tau, Tensor) and tau.requires_grad)
        or (mask is not None and mask.requires_grad)
    ):
        return NormSoftmaxFunction.apply(x, mask, tau, eps, dim)
    return KERNELS(x)[0](x, *_kernel_arguments(x, mask, tau, eps, dim))


def _kernel_arguments(
    x: Tensor, mask: Tensor | None, tau: float | Tensor, eps: float, dim: int
) -> tuple[Tensor | None, Tensor | None, float, float, int]:
    """The arguments of the kernel ops after x."""
    acc = accumulation_dtype(x.dtype)
    if mask is not None and mask.dtype not in (torch.bool, x.dtype, acc):
        mask = reference.mask_in(mask, acc)
    if isinstance(tau, Tensor):
        return mask, tau.to(acc), 0.0, eps, dim
    return mask, None, tau, eps, dim


class NormSoftmaxFunction(torch.autograd.Function):
    """`norm_softmax` for autograd.

    What it keeps is x: the backward pass computes the distribution again, which costs less than
    reading it, and needs x in any case.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, tau: float | Tensor, eps: float, dim: int
    ) -> Tensor:
        """See `norm_softmax`."""
        forward, backward = KERNELS(x)
        is_tensor = isinstance(tau, Tensor)
        ctx.call = backward, None if is_tensor else tau, eps, dim
        ctx.save_for_backward(x, mask, tau if is_tensor else None)
        return forward(x, *_kernel_arguments(x, mask, tau, eps, dim))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `reference.backward`.

        Gradients that will themselves be differentiated are computed by the reference formula,
        which autograd follows.
        """
        x, mask, tau = ctx.saved_tensors
        kernel, tau_value, eps, dim = ctx.call
        wants_x, wants_mask, wants_tau, *_ = ctx.needs_input_grad
        given = tau_value if tau is None else tau
        grad_x = grad_mask = grad_tau = None
        if wants_x or wants_tau:
            if torch.is_grad_enabled():
                found = reference.backward(grad, x, mask, given, eps, dim, wants_x, wants_tau)
            else:
                arguments = _kernel_arguments(x, mask, given, eps, dim)
                found = kernel(grad, x, *arguments, wants_x, wants_tau)
            grad_x = found[0] if wants_x else None
            grad_tau = found[1].sum().to(tau.dtype) if wants_tau else None
        if wants_mask:
            grad_mask = _grad_of_mask(grad, x, mask, given, eps, dim)
        return grad_x, grad_mask, grad_tau, None, None


def _grad_of_mask(
    grad: Tensor, x: Tensor, mask: Tensor, tau: float | Tensor, eps: float, dim: int
) -> Tensor:
    """The gradient of an additive mask, in plain PyTorch."""
    acc = accumulation_dtype(x.dtype)
    y = reference.norm_softmax(x.to(acc), mask, tau, eps, dim)
    return reference.grad_of_logits(grad.to(acc), y, dim).sum_to_size(mask.shape).to(mask.dtype)


def _public(
    x: Tensor, dim: int = -1, tau: float = 1.0, eps: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    return norm_softmax(x, dim, tau=tau, eps=eps, mask=mask)


declare_public(
    "norm_softmax(Tensor x, int dim=-1, float tau=1.0, float eps=1e-6, Tensor? mask=None)"
    " -> Tensor",
    _public,
)
