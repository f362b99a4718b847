"""What RMSNorm, CRMSNorm and LayerNorm share: their kernel ops, their gradient, and the way of a
call from the function to the kernel.

A call goes from `rms_norm`, `crms_norm` or `layer_norm` through `run` and `NormFunction` to the
kernel op; the public ops ``torch.ops.effkern.rms_norm``, ``add_rms_norm`` and so on decompose into
that call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.backends.reference import norm as reference
from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.ops._declare import Family, declare, imported_at_first_call


class Norm(NamedTuple):
    """One member of the family.

    Attributes:
        name: of its function, and of its ops.
        formula: its definition.
        parameters: the names of its tensors of parameters.
        autocast_twin: CUDA autocast computes it in float32 where it does so with this op of
            PyTorch.
    """

    name: str
    formula: reference.Formula
    parameters: tuple[str, ...]
    autocast_twin: str


NORMS = {
    norm.name: norm
    for norm in (
        Norm("rms_norm", reference.RMS_NORM, ("weight",), "rms_norm"),
        Norm("crms_norm", reference.CRMS_NORM, ("weight",), "rms_norm"),
        Norm("layer_norm", reference.LAYER_NORM, ("weight", "bias"), "layer_norm"),
    )
}

# ---- the kernel ops ----


def _declare_kernels(norm: Norm) -> None:
    """Declare ``_NAME_forward``, ``_add_NAME_forward`` and ``_NAME_backward``.

    Their statistics are one number a row, rstd, or two: then with a first dimension of 2. Gradients
    of parameters come in the weight's dtype.
    """
    name, formula, parameters = norm.name, norm.formula, norm.parameters

    def add_forward_fake(
        x: Tensor, residual: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *_, dims, _ = rest
        shape = x.shape[: x.dim() - dims]
        numbers = formula.numbers
        statistics = x.new_empty(
            shape if numbers == 1 else (numbers, *shape), dtype=accumulation_dtype(x.dtype)
        )
        return x.new_empty(x.shape), x.new_empty(x.shape), statistics

    def add_forward(
        x: Tensor, residual: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *of_call, dims, eps = rest
        return reference.forward(formula, x, residual, of_call, dims, eps)

    def without_residual(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            y, _, statistics = function(x, None, *rest)
            return y, statistics

        return forward

    def backward_fake(
        grad: Tensor,
        grad_total: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        statistics: Tensor,
        dims: int,
        wants_x: bool,
        *wants: bool,
    ) -> tuple[Tensor, ...]:
        return x.new_empty(x.shape if wants_x else 0), *(
            weight.new_empty(weight.shape) if wanted and weight is not None else x.new_empty(0)
            for wanted in wants
        )

    def backward(*call: Any) -> tuple[Tensor, ...]:
        first = len(call) - len(parameters)
        arguments: list[Any] = [*call[:first], call[first:]]
        return reference.backward(formula, *arguments)

    module = "effkern.backends.triton.norm"
    triton_forward = imported_at_first_call(f"{module}:{name}_forward")
    tensors = "".join(f"Tensor? {parameter}, " for parameter in parameters)
    declare(
        f"_{name}_forward",
        f"(Tensor x, {tensors}int dims, float eps) -> (Tensor y, Tensor statistics)",
        fake=without_residual(add_forward_fake),
        reference=without_residual(add_forward),
        triton=without_residual(triton_forward),
    )
    declare(
        f"_add_{name}_forward",
        f"(Tensor x, Tensor residual, {tensors}int dims, float eps)"
        " -> (Tensor y, Tensor total, Tensor statistics)",
        fake=add_forward_fake,
        reference=add_forward,
        triton=triton_forward,
    )
    wants = "".join(f", bool wants_{parameter}" for parameter in parameters)
    gradients = "".join(f", Tensor grad_{parameter}" for parameter in parameters)
    declare(
        f"_{name}_backward",
        "(Tensor grad, Tensor? grad_total, Tensor x, Tensor? weight, Tensor statistics, int dims,"
        f" bool wants_x{wants}) -> (Tensor grad_x{gradients})",
        fake=backward_fake,
        reference=backward,
        triton=imported_at_first_call(f"{module}:{name}_backward"),
    )


for _norm in NORMS.values():
    _declare_kernels(_norm)
KERNELS = {
    name: Family(f"_{name}_forward", f"_add_{name}_forward", f"_{name}_backward") for name in NORMS
}

# ---- the function ----


def run(
    name: str,
    x: Tensor,
    residual: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    dims: int,
    eps: float | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm of arguments that have been checked: y, or with a residual y and the sum."""
    if x.is_cuda and torch.is_autocast_enabled("cuda") and _autocast_to_float32(name):
        x, residual, *rest = map(_to_float32, (x, residual, *parameters))
        parameters = tuple(rest)
    if eps is None:
        eps = torch.finfo(accumulation_dtype(x.dtype)).eps
    if _functorch_is_active():
        # torch.func differentiates and maps the plain formula, to any order and in forward mode.
        y, total, _ = reference.forward(NORMS[name].formula, x, residual, parameters, dims, eps)
        return y if residual is None else (y, total)
    if torch.is_grad_enabled():
        needs_grad = x.requires_grad or (residual is not None and residual.requires_grad)
        for parameter in parameters:
            needs_grad = needs_grad or (parameter is not None and parameter.requires_grad)
        if needs_grad:
            if residual is None:
                return NormFunction.apply(name, dims, eps, x, *parameters)
            return AddNormFunction.apply(name, dims, eps, x, residual, *parameters)
    forward, add_forward, _ = KERNELS[name](x)
    if residual is None:
        return forward(x, *parameters, dims, eps)[0]
    return add_forward(x, residual, *parameters, dims, eps)[:2]


_functorch_is_active = torch._C._are_functorch_transforms_active


def _to_float32(tensor: Any) -> Any:
    """As autocast does it: float64 stays."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


@cache
def _autocast_to_float32(name: str) -> bool:
    """Whether this PyTorch lists the twin among the ops that CUDA autocast computes in float32."""
    twin = f"aten::{NORMS[name].autocast_twin}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(twin, "AutocastCUDA")


# ---- the gradient ----


class NormFunction(torch.autograd.Function):
    """A norm for autograd, without a residual."""

    @staticmethod
    def forward(
        ctx: Any, name: str, dims: int, eps: float, x: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        """See `reference.forward`."""
        forward, _, backward = KERNELS[name](x)
        y, statistics = forward(x, *parameters, dims, eps)
        ctx.call = name, backward, dims, eps
        ctx.save_for_backward(x, parameters[0], statistics)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `reference.backward`."""
        _, _, _, wants_x, *wants = ctx.needs_input_grad
        return None, None, None, *_gradients(ctx, grad, None, wants_x, wants)


class AddNormFunction(torch.autograd.Function):
    """A norm for autograd, with a residual: y and the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        dims: int,
        eps: float,
        x: Tensor,
        residual: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See `reference.forward`."""
        _, add_forward, backward = KERNELS[name](x)
        y, total, statistics = add_forward(x, residual, *parameters, dims, eps)
        ctx.call = name, backward, dims, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, parameters[0], statistics)
        return y, total

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """See `reference.backward`; a gradient is None where its output was not used."""
        _, _, _, needs_x, needs_residual, *wants = ctx.needs_input_grad
        grad_x: Tensor | None
        gradients: list[Tensor | None]
        if grad is None:
            grad_x, gradients = grad_total, [None] * len(wants)
        else:
            grad_x, *gradients = _gradients(ctx, grad, grad_total, needs_x or needs_residual, wants)
        x, residual = grad_x if needs_x else None, grad_x if needs_residual else None
        return None, None, None, x, residual, *gradients


def _gradients(
    ctx: Any, grad: Tensor, grad_total: Tensor | None, wants_x: bool, wants: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of what was normalised and of the parameters; None where not wanted.

    A gradient that will itself be differentiated is computed by the reference formula, which
    autograd follows, with the statistics as a function of x.
    """
    x, weight, statistics = ctx.saved_tensors
    name, kernel, dims, eps = ctx.call
    if torch.is_grad_enabled():
        formula = NORMS[name].formula
        statistics = reference.statistics(formula, x, dims, eps)
        found = reference.backward(
            formula, grad, grad_total, x, weight, statistics, dims, wants_x, wants
        )
    else:
        found = kernel(grad, grad_total, x, weight, statistics, dims, wants_x, *wants)
    return [each if wanted else None for each, wanted in zip(found, (wants_x, *wants), strict=True)]
