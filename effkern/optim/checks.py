"""What the fused optimizers refuse, and how they name it. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from effkern.backends.table import DTYPES, QUANTIZED_BLOCK
from effkern.optim.distributed import PLAIN, is_dtensor, local_tensor, same_layout
from effkern.optim.storage import MASTER, codes_key, scales_key

_COMPLEX = (torch.complex64, torch.complex128)
_WIDE = (torch.float64, *_COMPLEX)


def name_of(group: dict[str, Any], param: Tensor) -> str:
    """How messages call ``param``: by its name where the group has names, else by its index."""
    index = next(i for i, p in enumerate(group["params"]) if p is param)
    names = group.get("param_names") or ()  # fewer than parameters where a list was added to
    return (
        f"parameter {names[index]!r}" if index < len(names) else f"parameter {index} of its group"
    )


def check_param(optimizer: Optimizer, group: dict[str, Any], param: Tensor) -> None:
    """Refuse a parameter that the kernels cannot update.

    Raises:
        RuntimeError: if its dtype is none of `DTYPES` and no complex of two of them, it is on the
            meta device, its layout is not strided, its elements share memory, it is a view whose
            memory holds it negated or conjugated, its states cannot be stored as its group asks,
            it is a subclass other than DTensor that wraps other tensors, or a DTensor that is not
            yet summed up (Partial).
    """
    problem = ""
    whole, param = param, local_tensor(param)
    if param.dtype not in DTYPES and param.dtype not in _COMPLEX:
        problem = (
            "must be float32, float64, bfloat16, float16, complex64 or complex128, "
            f"got {param.dtype}"
        )
    elif param.device.type == "meta":
        problem = "must have memory, got a tensor on the meta device"
    elif param.layout != torch.strided:
        problem = f"must be a dense tensor, got layout {param.layout}"
    elif type(param) not in PLAIN and is_traceable_wrapper_subclass(param):
        problem = f"must be a plain tensor, got {type(param).__name__}, which wraps others"
    elif is_dtensor(whole) and any(p.is_partial() for p in whole.placements):
        problem = f"must not be partial, got placements {whole.placements}"
    elif not torch.compiler.is_compiling() and (param.is_neg() or param.is_conj()):
        # Dynamo cannot trace the question.
        problem = "must not be a negated or conjugated view of its memory"
    elif 0 in param.stride() and torch._debug_has_internal_overlap(param) == 1:
        problem = (
            "must have memory of its own for each element, got an expanded tensor of strides "
            f"{param.stride()}"
        )
    elif group.get("state_dtype") is not None and param.dtype in _WIDE:
        problem = f"is {param.dtype} and has states of that; it takes no state_dtype"
    if problem:
        raise RuntimeError(f"{type(optimizer).__name__}: {name_of(group, whole)} {problem}")


def check_grad(optimizer: Optimizer, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
    """Refuse a gradient that is sparse or wraps others, or that does not fit its parameter.

    Raises:
        RuntimeError: as said; to fit is to have its dtype, device and shape, and to be a DTensor
            of the same mesh if it is one.
    """
    kind = type(optimizer).__name__
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{kind} does not support sparse gradients: that of {name_of(group, param)} is "
            f"{grad.layout}"
        )
    if is_dtensor(param):
        if not is_dtensor(grad) or grad.device_mesh != param.device_mesh:
            raise RuntimeError(
                f"{kind}: the gradient of {name_of(group, param)} must be a DTensor of the "
                f"parameter's mesh, got {_described(grad)}"
            )
    elif type(grad) not in PLAIN and is_traceable_wrapper_subclass(grad):
        raise RuntimeError(
            f"{kind}: the gradient of {name_of(group, param)} must be a plain tensor, got "
            f"{type(grad).__name__}, which wraps others"
        )
    for what in ("dtype", "device", "shape"):
        has, must = getattr(grad, what), getattr(param, what)
        if has != must:
            if what == "shape":
                has, must = tuple(has), tuple(must)
            raise RuntimeError(
                f"{kind}: the gradient of {name_of(group, param)} must have {what} {must}, "
                f"got {has}"
            )


def check_state(
    optimizer: Optimizer, group: dict[str, Any], param: Tensor, names: Sequence[str | None]
) -> None:
    """Refuse state, from a loaded state_dict say, that does not fit its parameter.

    Raises:
        RuntimeError: if a state tensor has another shape than the parameter, is not dense, or has
            another mesh or other placements, codes of 8 bits are without the scales of their
            blocks, or the step counter is not one number.
    """
    state = optimizer.state.get(param)
    if not state:
        return
    if not isinstance(state, dict):
        raise RuntimeError(
            f"{type(optimizer).__name__}: the state of {name_of(group, param)} must be a dict, got "
            f"{type(state).__name__}"
        )
    kept = [name for name in names if name is not None]
    shapes = dict.fromkeys([*kept, MASTER], param.shape)
    local = local_tensor(param)
    in_eight_bits: dict[str, torch.Size] = {}
    for name in kept:
        if codes_key(name) in state:
            blocks = torch.Size([-(-local.numel() // QUANTIZED_BLOCK)])
            in_eight_bits |= {codes_key(name): local.shape, scales_key(name): blocks}
    for name, shape in (shapes | in_eight_bits).items():
        value = state.get(name)
        if value is None and name not in in_eight_bits:
            continue
        problem = ""
        if not isinstance(value, Tensor) or value.shape != shape:
            has = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            problem = f"have shape {tuple(shape)}, got {has}"
        elif value.layout != torch.strided:
            problem = f"be a dense tensor, got layout {value.layout}"
        elif name in shapes and not same_layout(value, param):
            problem = f"be {_described(param)}, got {_described(value)}"
        if problem:
            raise RuntimeError(
                f"{type(optimizer).__name__}: state {name!r} of {name_of(group, param)} must "
                f"{problem}"
            )
    step = state.get("step", 0)
    if not (isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1)):
        has = tuple(step.shape) if isinstance(step, Tensor) else type(step).__name__
        raise RuntimeError(
            f"{type(optimizer).__name__}: state 'step' of {name_of(group, param)} must be one "
            f"number, got {has}"
        )


def _described(tensor: Tensor) -> str:
    """How messages call a tensor's place among processes."""
    if not is_dtensor(tensor):
        return "a plain tensor"
    return f"a DTensor of {tensor.device_mesh} and placements {tensor.placements}"
