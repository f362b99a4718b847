"""What RMSNorm, CRMSNorm and LayerNorm share: their kernel ops, their gradient, and the way of a
call from the function to the kernel.

A call goes from `rms_norm`, `crms_norm` or `layer_norm` through `affine_norm` and `NormFunction` to
the kernel op; the public ops ``torch.ops.effkern.rms_norm``, ``add_rms_norm`` and so on decompose
into that call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.backends.choice import requested
from effkern.backends.reference import norm as reference
from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.ops._declare import DTYPES, Family, declare, imported_at_first_call
from effkern.ops._modes import transforms_are_active
from effkern.ops.norm_checks import check, fits, strided

is_grad_enabled = torch.is_grad_enabled


class Norm(NamedTuple):
    """One member of the family. All kernels take a weight and a bias.

    Attributes:
        name: of its function, and of its ops.
        formula: its definition.
        autocast_twin: CUDA autocast computes it in float32 where it does so with this op of
            PyTorch.
    """

    name: str
    formula: reference.Formula
    autocast_twin: str


NORMS = {
    norm.name: norm
    for norm in (
        Norm("rms_norm", reference.RMS_NORM, "rms_norm"),
        Norm("crms_norm", reference.CRMS_NORM, "rms_norm"),
        Norm("layer_norm", reference.LAYER_NORM, "layer_norm"),
    )
}

# ---- the kernel ops ----


def _declare_kernels(norm: Norm) -> None:
    """Declare ``_NAME_forward``, ``_add_NAME_forward``, ``_NAME_backward`` and ``_NAME_inference``,
    which is the first without what the third would need.

    Their statistics are one number a row, rstd, or two: then with a first dimension of 2. Gradients
    of parameters come in the weight's dtype. ``x_is_y``: the backward kernel gets the forward's y
    in the place of x, and the bias with it (see `reference.backward`).
    """
    name, formula = norm.name, norm.formula

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

    def only_y(function: Callable[..., Any]) -> Callable[..., Any]:
        def inference(x: Tensor, *rest: Any) -> Tensor:
            y, _, _ = function(x, None, *rest)
            return y

        return inference

    def inference_fake(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
    ) -> Tensor:
        check(name, x, None, x.shape[x.dim() - dims :], {"weight": weight, "bias": bias})
        return x.new_empty(x.shape)

    def backward_fake(
        grad: Tensor,
        grad_total: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        statistics: Tensor,
        dims: int,
        wants_x: bool,
        wants_weight: bool,
        wants_bias: bool,
        x_is_y: bool = False,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return x.new_empty(x.shape if wants_x else 0), *(
            weight.new_empty(weight.shape) if wanted and weight is not None else x.new_empty(0)
            for wanted in (wants_weight, wants_bias)
        )

    def backward(*call: Any) -> tuple[Tensor, ...]:
        arguments: list[Any] = [*call[:7], call[7:9], *call[9:]]
        return reference.backward(formula, *arguments)

    module = "effkern.backends.triton.norm"
    triton_forward = imported_at_first_call(f"{module}:{name}_forward")
    parameters = "Tensor? weight, Tensor? bias"
    declare(
        f"_{name}_forward",
        f"(Tensor x, {parameters}, int dims, float eps) -> (Tensor y, Tensor statistics)",
        fake=without_residual(add_forward_fake),
        reference=without_residual(add_forward),
        triton=without_residual(triton_forward),
    )
    declare(
        f"_{name}_inference",
        f"(Tensor x, {parameters}, int dims, float eps) -> Tensor",
        fake=inference_fake,
        reference=only_y(add_forward),
        triton=only_y(triton_forward),
    )
    declare(
        f"_add_{name}_forward",
        f"(Tensor x, Tensor residual, {parameters}, int dims, float eps)"
        " -> (Tensor y, Tensor total, Tensor statistics)",
        fake=add_forward_fake,
        reference=add_forward,
        triton=triton_forward,
    )
    declare(
        f"_{name}_backward",
        "(Tensor grad, Tensor? grad_total, Tensor x, Tensor? weight, Tensor statistics, int dims,"
        " bool wants_x, bool wants_weight, bool wants_bias, bool x_is_y=False, Tensor? bias=None)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        fake=backward_fake,
        reference=backward,
        triton=imported_at_first_call(f"{module}:{name}_backward"),
    )


for _norm in NORMS.values():
    _declare_kernels(_norm)
KERNELS = {
    name: Family(
        f"_{name}_forward", f"_add_{name}_forward", f"_{name}_backward", f"_{name}_inference"
    )
    for name in NORMS
}
_INFERENCE = {name: getattr(torch.ops.effkern, f"_{name}_inference").default for name in NORMS}
_MACHINE_EPSILON = {dtype: torch.finfo(accumulation_dtype(dtype)).eps for dtype in DTYPES}

# ---- the function ----


def affine_norm(
    name: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A norm over the last dimensions, with a weight and a bias that may be None.

    Args:
        name: of `NORMS`; also of the function in the messages.
        x: this and all that follow as `effkern.nn.functional.layer_norm` takes them.
        normalized_shape: at least one dimension.
        weight: or None.
        bias: or None.
        eps: None stands for the machine epsilon of the accumulation dtype.
        residual: or None.
        memory_efficient: whether y is kept in the place of what was normalised.

    Returns:
        y, or with a residual y and the sum.

    Raises:
        TypeError, RuntimeError: as `check`.
    """
    dims = len(normalized_shape)
    # Inference goes to the kernel at once, which checks what is left; what it does not take goes on
    # below. Between the products of a network all this has left the caches, and a Python function
    # less is worth as much as the arithmetic on 20,000 numbers.
    try:
        if (
            residual is None
            and not is_grad_enabled()
            and x.is_cpu
            and (
                x.shape[-1] == normalized_shape[0]
                if dims == 1
                else x.shape[-dims:] == normalized_shape
            )
            and (bias is None or weight is not None)
            and requested() is None
            and not transforms_are_active()
        ):
            if eps is None:
                eps = _MACHINE_EPSILON[x.dtype]
            return _INFERENCE[name](x, weight, bias, dims, eps)
    except (AttributeError, LookupError, RuntimeError):
        pass
    # The common case in one expression, each part in its cheapest form: every call pays for it.
    if not (
        isinstance(x, Tensor)
        and x.dtype in DTYPES
        and x.layout is strided
        and (shape := x.shape)
        and dims > 0
        and (shape[-1] == normalized_shape[0] if dims == 1 else shape[-dims:] == normalized_shape)
        and residual is None
        and fits(weight, normalized_shape, x)
        and fits(bias, normalized_shape, x)
    ):
        check(name, x, residual, normalized_shape, {"weight": weight, "bias": bias})
    return run(name, x, residual, (weight, bias), dims, eps, memory_efficient)


def run(
    name: str,
    x: Tensor,
    residual: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    dims: int,
    eps: float | None,
    memory_efficient: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm of arguments that have been checked: y, or with a residual y and the sum."""
    weight, bias = parameters
    if bias is not None and (weight is None or weight.dtype != bias.dtype):
        parameters = _alike(weight, bias, x)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and _autocast_to_float32(name):
        x, residual, weight, bias = map(_to_float32, (x, residual, *parameters))
        parameters = weight, bias
    if eps is None:
        eps = _MACHINE_EPSILON[x.dtype]
    if transforms_are_active():
        # torch.func differentiates and maps the plain formula, to any order and in forward mode.
        y, total, _ = reference.forward(NORMS[name].formula, x, residual, parameters, dims, eps)
        return y if residual is None else (y, total)
    if is_grad_enabled():
        needs_grad = x.requires_grad or (residual is not None and residual.requires_grad)
        for parameter in parameters:
            needs_grad = needs_grad or (parameter is not None and parameter.requires_grad)
        if needs_grad:
            how = name, dims, eps, memory_efficient
            if residual is None:
                return NormFunction.apply(how, x, *parameters)
            y, total = AddNormFunction.apply(how, x, residual, *parameters)
            # As the sum in plain operations: with frozen inputs nothing flows back through it.
            flows = x.requires_grad or residual.requires_grad
            return y, total if flows else total.detach()
    _, add_forward, _, inference = KERNELS[name](x)
    if residual is None:
        return inference(x, *parameters, dims, eps)
    return add_forward(x, residual, *parameters, dims, eps)[:2]


def _alike(weight: Tensor | None, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both, in one dtype, as the kernels take them."""
    if weight is None:
        return torch.ones_like(bias), bias
    acc = accumulation_dtype(x.dtype)
    return weight.to(acc), bias.to(acc)


def _to_float32(tensor: Any) -> Any:
    """As autocast does it: float64 stays."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


@cache
def _autocast_to_float32(name: str) -> bool:
    """Whether this PyTorch lists the twin among the ops that CUDA autocast computes in float32."""
    twin = f"aten::{NORMS[name].autocast_twin}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(twin, "AutocastCUDA")


# ---- the gradient ----

#: The name of a norm, the number of normalised dimensions, eps, and whether memory is to be saved.
How = tuple[str, int, float, bool]


class NormFunction(torch.autograd.Function):
    """A norm for autograd, without a residual."""

    @staticmethod
    def forward(
        ctx: Any, how: How, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See `reference.forward`."""
        name, dims, eps, _ = how
        forward, _, backward, _ = KERNELS[name](x)
        y, statistics = forward(x, weight, bias, dims, eps)
        _keep(ctx, how, backward, x, y, statistics, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `reference.backward`."""
        _, wants_x, *wants = ctx.needs_input_grad
        return None, *_gradients(ctx, grad, None, wants_x, wants)


class AddNormFunction(torch.autograd.Function):
    """A norm for autograd, with a residual: y and the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        how: How,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See `reference.forward`."""
        name, dims, eps, _ = how
        _, add_forward, backward, _ = KERNELS[name](x)
        y, total, statistics = add_forward(x, residual, weight, bias, dims, eps)
        ctx.set_materialize_grads(False)
        _keep(ctx, how, backward, total, y, statistics, weight, bias)
        return y, total

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """See `reference.backward`; a gradient is None where its output was not used."""
        _, needs_x, needs_residual, *wants = ctx.needs_input_grad
        grad_x: Tensor | None
        gradients: list[Tensor | None]
        if grad is None:
            grad_x, gradients = grad_total, [None] * len(wants)
        else:
            grad_x, *gradients = _gradients(ctx, grad, grad_total, needs_x or needs_residual, wants)
        x, residual = grad_x if needs_x else None, grad_x if needs_residual else None
        return None, x, residual, *gradients


def _keep(
    ctx: Any,
    how: How,
    backward: Any,
    x: Tensor,
    y: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Keep what the gradients need: what was normalised, or in its place y and the bias."""
    name, dims, eps, memory_efficient = how
    x_is_y = memory_efficient and _leaves_enough(y, weight, bias)
    ctx.call = name, backward, dims, eps, x_is_y
    if x_is_y:
        ctx.save_for_backward(y, weight, statistics, bias)
    else:
        ctx.save_for_backward(x, weight, statistics)


def _leaves_enough(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether y may be kept in the place of x, as far as that can be told without waiting.

    Where it cannot, on a GPU and while a graph is traced, the answer is yes, and the backward pass
    makes NaN of what cannot be restored.
    """
    if (
        weight is None
        or not weight.is_cpu
        or torch.compiler.is_compiling()
        or type(y) is not Tensor
    ):
        return True
    acc = accumulation_dtype(y.dtype)
    of_bias = None if bias is None else bias.to(acc)
    return bool(reference.leaves_enough(weight.to(acc), of_bias, y.dtype).all())


def _gradients(
    ctx: Any, grad: Tensor, grad_total: Tensor | None, wants_x: bool, wants: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of what was normalised and of the parameters; None where not wanted.

    A gradient that will itself be differentiated is computed by the reference formula, which
    autograd follows, with the statistics as a function of x.
    """
    name, kernel, dims, eps, x_is_y = ctx.call
    x, weight, statistics, *rest = ctx.saved_tensors
    if torch.is_grad_enabled():
        if x_is_y:
            raise RuntimeError(
                f"{name}: memory_efficient=True keeps no input, so there are no second derivatives"
            )
        formula = NORMS[name].formula
        statistics = reference.statistics(formula, x, dims, eps)
        found = reference.backward(
            formula, grad, grad_total, x, weight, statistics, dims, wants_x, wants
        )
    else:
        found = kernel(
            grad, grad_total, x, weight, statistics, dims, wants_x, *wants, x_is_y, *rest
        )
    return [each if wanted else None for each, wanted in zip(found, (wants_x, *wants), strict=True)]
