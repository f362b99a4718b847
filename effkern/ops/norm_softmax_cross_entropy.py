"""The cross-entropy of NormSoftmax: its kernel ops, its gradient and the function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference import norm_softmax as reference
from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.ops._declare import Family, declare, imported_at_first_call
from effkern.ops._modes import (
    autocast_is_on,
    is_traced_or_mapped,
    may_be_looked_at,
    transforms_are_active,
)
from effkern.ops.norm_softmax_checks import check_cross_entropy, tau_of

# ---- the kernel ops ----
#
# Logits are rows of classes; the temperature is as `norm_softmax` has it; a target of probabilities
# is of the logits' dtype or of the accumulation dtype; weight and scale are of the latter.


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, wants_logits, wants_tau = rest
    acc, rows = accumulation_dtype(logits.dtype), logits.shape[0]
    return (
        logits.new_empty(rows, dtype=acc),
        logits.new_empty(logits.shape if wants_logits else 0),
        logits.new_empty(rows if wants_tau else 0, dtype=acc),
    )


def _rows(logits: Tensor, target: Tensor, weight: Any, *rest: Any) -> Any:
    tau, tau_value, *others = rest
    one = tau_value if tau is None else tau
    return reference.cross_entropy_rows(logits, target, weight, one, *others)


def _fake_in_place(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    loss, _, grad_tau = _fake(logits, *rest[:-1], False, rest[-1])
    return loss, grad_tau


def _rows_in_place(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    loss, grad, grad_tau = _rows(logits, *rest[:-1], True, rest[-1])
    logits.copy_(grad)
    return loss, grad_tau


_ARGUMENTS = (
    "Tensor target, Tensor? weight, Tensor? tau, float tau_value, float eps, float label_smoothing,"
    " int ignore_index"
)
_MODULE = "effkern.backends.triton.norm_softmax_cross_entropy"
declare(
    "_norm_softmax_cross_entropy",
    f"(Tensor logits, {_ARGUMENTS}, Tensor? scale, bool wants_logits, bool wants_tau)"
    " -> (Tensor loss, Tensor grad_logits, Tensor grad_tau)",
    fake=_fake,
    reference=_rows,
    triton=imported_at_first_call(f"{_MODULE}:rows"),
)
declare(
    "_norm_softmax_cross_entropy_",
    f"(Tensor(a!) logits, {_ARGUMENTS}, Tensor scale, bool wants_tau)"
    " -> (Tensor loss, Tensor grad_tau)",
    fake=_fake_in_place,
    reference=_rows_in_place,
    triton=imported_at_first_call(f"{_MODULE}:rows_in_place"),
)
KERNELS = Family("_norm_softmax_cross_entropy", "_norm_softmax_cross_entropy_")

# ---- the function ----


def norm_softmax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    tau: float | Tensor = 1.0,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` of ``logits / max(min(sigma, tau), eps)``, sigma the
    standard deviation over the classes: see `norm_softmax`.

    For "mean" and "sum" the logits' gradient is computed with the loss, in one pass over memory;
    beside the logits there is no other tensor of their size. In float16 it is computed by the
    backward pass, so that a loss that is scaled keeps it from vanishing.

    Args:
        logits: shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; float32, float64, bfloat16 or
            float16.
        target: class indices (int64 or uint8), of logits' shape without C; or probabilities, of
            logits' shape and a floating dtype.
        tau: the temperature, above 0: a number, or a tensor of one element, to which a gradient
            flows.
        eps: the least divisor, at least 0.
        weight: of each class, shape ``(C,)``; or None.
        label_smoothing: from 0 to 1, as there.
        ignore_index: targets of this value add nothing; for class indices. Beside probabilities it
            must be negative, as there.
        reduction: "mean", "sum" or "none", as there.
        inplace: whether the gradient is written over the logits, which must then be of shape
            ``(N, C)`` or ``(C,)``, no leaf that requires a gradient, and of no further use; for
            "mean" and "sum". Without a gradient, and in a compiled graph, nothing is overwritten.
            In float16 it is then rounded before the loss's scale multiplies it.

    Returns:
        The loss, of logits' dtype: shape () but for "none", which gives that of a target of
        indices. Under CUDA autocast computed in float32, as PyTorch's.

    Raises:
        TypeError: if an argument that must be a tensor or a number is none.
        ValueError: if a number or the reduction is none of those that it may be.
        RuntimeError: if a dtype, shape, device or layout does not fit; the message names the
            argument. If a class index is out of range, on the CPU; on a GPU the loss is then NaN.
    """
    check_cross_entropy(
        logits, target, weight, tau, eps, label_smoothing, ignore_index, reduction, inplace
    )
    if autocast_is_on(logits.device.type) and logits.dtype != torch.float64:
        logits = logits.float()
    tau = tau_of(tau, logits)
    options = label_smoothing, ignore_index, reduction
    needs_grad = torch.is_grad_enabled() and (
        logits.requires_grad or (isinstance(tau, Tensor) and tau.requires_grad)
    )
    others = [t for t in (target, weight) if t is not None and t.requires_grad]
    if transforms_are_active() or (torch.is_grad_enabled() and others):
        # torch.func differentiates the plain formula; so are gradients of what seldom has one.
        return reference.norm_softmax_cross_entropy(logits, target, weight, tau, eps, *options)
    if needs_grad:
        return CrossEntropyFunction.apply(logits, target, weight, tau, eps, options, inplace)
    return _Call(logits, target, weight, tau, eps, options).loss()


class _Call:
    """A call of the kernel op: rows of classes, and what becomes of their losses."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        tau: float | Tensor,
        eps: float,
        options: tuple[float, int, str],
    ) -> None:
        smoothing, ignore_index, self.reduction = options
        self.dtype, self.acc = logits.dtype, accumulation_dtype(logits.dtype)
        self.shape, self.of_classes = logits.shape, min(1, logits.dim() - 1)
        self.logits = self._as_rows(logits)
        if target.is_floating_point():
            target = self._as_rows(target)
            if target.dtype not in (self.dtype, self.acc):
                target = target.to(self.acc)
        else:
            target = target.reshape(-1).long()
        weight = None if weight is None else weight.detach().to(self.acc).contiguous()
        is_tensor = isinstance(tau, Tensor)
        self.arguments = (
            target,
            weight,
            tau.detach().to(self.acc) if isinstance(tau, Tensor) else None,
            0.0 if is_tensor else tau,
            eps,
            smoothing,
            ignore_index,
        )
        self.kernel, self.kernel_in_place = KERNELS(logits)

    def scale(self) -> Tensor:
        """What the sum of the rows' losses is multiplied by."""
        target, weight, *_, ignore_index = self.arguments
        one = torch.ones((), dtype=self.acc, device=self.logits.device)
        if self.reduction != "mean":
            return one
        if target.is_floating_point():
            return one / self.logits.shape[0]
        counted = target != ignore_index
        if weight is None:
            return one / counted.sum()
        of_rows = weight[torch.where(counted, target, 0)]
        return one / torch.where(counted, of_rows, 0).sum()

    def reduced(self, losses: Tensor, scale: Tensor | None = None) -> Tensor:
        """What the function returns."""
        if self.reduction == "none":
            shape = [size for d, size in enumerate(self.shape) if d != self.of_classes]
            result = losses.reshape(shape).to(self.dtype)
        else:
            result = (losses.sum() * (self.scale() if scale is None else scale)).to(self.dtype)
        # In a graph of PyTorch 2.11 an output that shares memory with another value of its Function
        # gets no gradient.
        return result.clone() if torch.compiler.is_compiling() else result

    def loss(self) -> Tensor:
        """Without gradients."""
        return self.reduced(self.kernel(self.logits, *self.arguments, None, False, False)[0])

    def gradients(self, scale: Tensor, wants_logits: bool, wants_tau: bool) -> Any:
        """The rows' losses, the logits' gradient or None, and tau's or None."""
        losses, grad, shares = self.kernel(
            self.logits, *self.arguments, scale, wants_logits, wants_tau
        )
        return (
            losses,
            self._as_given(grad) if wants_logits else None,
            shares.sum() if wants_tau else None,
        )

    def gradients_in_place(self, scale: Tensor, wants_tau: bool) -> Any:
        """The same with the gradient in place of the logits."""
        losses, shares = self.kernel_in_place(self.logits, *self.arguments, scale, wants_tau)
        return losses, shares.sum() if wants_tau else None

    def _as_rows(self, tensor: Tensor) -> Tensor:
        return (
            tensor.detach().movedim(self.of_classes, -1).reshape(-1, tensor.shape[self.of_classes])
        )

    def _as_given(self, rows: Tensor) -> Tensor:
        shape = [size for d, size in enumerate(self.shape) if d != self.of_classes]
        return rows.view(*shape, rows.shape[-1]).movedim(-1, self.of_classes)


class CrossEntropyFunction(torch.autograd.Function):
    """`norm_softmax_cross_entropy` for autograd.

    Gradients are computed with the loss and handed out by the first backward pass, multiplied in
    place by the gradient of the loss where that is not 1. A second backward pass computes them
    again; in place of the logits there can be none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        tau: float | Tensor,
        eps: float,
        options: tuple[float, int, str],
        inplace: bool,
    ) -> Tensor:
        """See the function."""
        call = _Call(logits, target, weight, tau, eps, options)
        wants_logits, _, _, wants_tau, *_ = ctx.needs_input_grad
        is_tensor = isinstance(tau, Tensor)
        # What a compiled graph overwrites is its compiler's choice.
        ctx.found = None
        ctx.inplace = inplace and wants_logits and not torch.compiler.is_compiling()
        ctx.call = None if is_tensor else tau, eps, options
        if ctx.inplace:
            scale = call.scale()
            losses, grad_tau = call.gradients_in_place(scale, wants_tau)
            torch.autograd.graph.increment_version(logits)
            ctx.found = call._as_given(call.logits), grad_tau
            return call.reduced(losses, scale)
        ctx.save_for_backward(logits, target, weight, tau if is_tensor else None)
        # In float16 gradients of a mean need the loss's scale before they are rounded.
        if call.reduction == "none" or logits.dtype == torch.float16:
            return call.loss()
        scale = call.scale()
        losses, *ctx.found = call.gradients(scale, wants_logits, wants_tau)
        return call.reduced(losses, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the logits and of tau."""
        found, ctx.found = ctx.found, None
        if ctx.inplace and (found is None or torch.is_grad_enabled()):
            raise RuntimeError(
                "norm_softmax_cross_entropy: with inplace=True there is one backward pass, and no "
                "second derivative: the logits are gone"
            )
        wants_logits, _, _, wants_tau, *_ = ctx.needs_input_grad
        if found is None or torch.is_grad_enabled():
            logits, target, weight, tau = ctx.saved_tensors
            tau_value, eps, options = ctx.call
            tau = tau_value if tau is None else tau
            if torch.is_grad_enabled():
                found = _differentiable(
                    grad, logits, target, weight, tau, eps, options, wants_logits, wants_tau
                )
            else:
                call = _Call(logits, target, weight, tau, eps, options)
                scale = call.scale() * grad.to(call.acc).reshape(-1).contiguous()
                _, *found = call.gradients(scale, wants_logits, wants_tau)
        elif is_traced_or_mapped(grad):
            found = [None if each is None else each * grad for each in found]
        elif not may_be_looked_at(grad) or grad != 1:
            found = [None if each is None else each.mul_(grad) for each in found]
        grad_logits, grad_tau = found
        if grad_tau is not None:
            grad_tau = grad_tau.reshape(())
        return grad_logits, None, None, grad_tau, None, None, None


def _differentiable(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tau: Any,
    eps: float,
    options: tuple[float, int, str],
    wants_logits: bool,
    wants_tau: bool,
) -> list[Tensor | None]:
    """The gradients by the plain formula, which autograd follows."""
    # Views: one input may be a function of the other.
    x = logits.view_as(logits)
    t = tau.view_as(tau) if isinstance(tau, Tensor) else tau
    loss = reference.norm_softmax_cross_entropy(x, target, weight, t, eps, *options)
    wanted = [each for each, wants in ((x, wants_logits), (t, wants_tau)) if wants]
    found = list(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [found.pop(0) if wants else None for wants in (wants_logits, wants_tau)]
