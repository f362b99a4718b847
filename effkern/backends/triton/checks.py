"""What the kernels rely on, checked before anything is written: csrc/torch's errors, in Python.

Callers of the public functions have passed stricter checks; these are for those who call the
kernel ops themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effkern.backends.table import QUANTIZED_BLOCK
from effkern.backends.triton.numerics import TRITON_DTYPE
from effkern.backends.triton.storage import Storage

_NUMBERS = (torch.float32, torch.float64)


def check_dtype(tensor: torch.Tensor, name: str) -> None:
    """Refuse a dtype that no kernel takes."""
    if tensor.dtype not in TRITON_DTYPE:
        raise RuntimeError(
            f"{name} has dtype {tensor.dtype}; it must be float32, float64, bfloat16 or float16"
        )


def check_device(tensor: torch.Tensor, name: str, like: torch.Tensor, like_name: str) -> None:
    """Refuse a tensor that is not where ``like`` is."""
    if tensor.device != like.device:
        raise RuntimeError(
            f"{name} is on {tensor.device}; it must be on the device of {like_name}, {like.device}"
        )


def check_like(
    tensor: torch.Tensor,
    name: str,
    like: torch.Tensor,
    like_name: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse a tensor that has not the device and shape of ``like``, and its dtype or ``dtype``."""
    check_device(tensor, name, like, like_name)
    if dtype is not None and tensor.dtype != dtype:
        raise RuntimeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if dtype is None and tensor.dtype != like.dtype:
        raise RuntimeError(
            f"{name} has dtype {tensor.dtype}; it must have that of {like_name}, {like.dtype}"
        )
    if tensor.shape != like.shape:
        raise RuntimeError(
            f"{name} has shape {tuple(tensor.shape)}; it must have that of {like_name}, "
            f"{tuple(like.shape)}"
        )


def check_lists(
    params: Sequence[torch.Tensor],
    lists: dict[str, tuple[Sequence[torch.Tensor], torch.dtype]],
    steps: Sequence[torch.Tensor],
) -> None:
    """Refuse lists that do not belong to one multi-tensor step.

    ``lists``: by argument name, the gradients, states and masters, one tensor per parameter in
    each, and their dtype; ``steps``: a number for each parameter, or none at all.
    """
    counts = {name: len(tensors) for name, (tensors, _) in lists.items()}
    for name, count in {**counts, **({"steps": len(steps)} if steps else {})}.items():
        if count != len(params):
            raise RuntimeError(
                f"{name} has {count} tensors; it must have as many as params, {len(params)}"
            )
    check_dtype(params[0], "params[0]")
    for index, param in enumerate(params):
        if param.dtype != params[0].dtype or param.device != params[0].device:
            raise RuntimeError(
                f"params[{index}] has another dtype or device than params[0]; "
                "one call takes one of each"
            )
        if not is_dense(param):
            raise RuntimeError(
                f"params[{index}] has strides {param.stride()}; it must fill one stretch of memory"
            )
        for name, (tensors, dtype) in lists.items():
            other = None if dtype == param.dtype else dtype
            check_like(tensors[index], f"{name}[{index}]", param, "its parameter", other)
            if not same_strides(param.shape, tensors[index].stride(), param.stride()):
                raise RuntimeError(
                    f"{name}[{index}] has strides {tensors[index].stride()}; "
                    f"it must have those of its parameter, {param.stride()}"
                )
    for index, step in enumerate(steps):
        here = step.is_cpu or step.device == params[0].device
        if (
            step.numel() != 1
            or step.dtype not in _NUMBERS
            or not here
            or (step.dtype, step.device) != (steps[0].dtype, steps[0].device)
        ):
            raise RuntimeError(
                f"steps[{index}] must be one number, float32, or float64 as all steps are, on the "
                "CPU or all on the parameters' device"
            )


def check_scales(
    scales: Sequence[torch.Tensor], params: Sequence[torch.Tensor], states: int
) -> None:
    """Refuse scales that do not belong to ``states`` states in 8 bits of each parameter."""
    if len(scales) != states * len(params):
        raise RuntimeError(
            f"scales has {len(scales)} tensors; it must have one for each parameter and state"
        )
    for index, one in enumerate(scales):
        param = params[index % len(params)]
        blocks = -(-param.numel() // QUANTIZED_BLOCK)
        if (
            one.dtype != torch.float32
            or one.numel() != blocks
            or not one.is_contiguous()
            or one.device != param.device
        ):
            raise RuntimeError(
                f"scales[{index}] must be {blocks} contiguous float32 numbers on the parameters' "
                "device"
            )


def check_storage(
    storage: Storage, params: Sequence[torch.Tensor], rounding_keys: Sequence[int]
) -> None:
    """Refuse what the parameters' dtype has no use for."""
    dtype = params[0].dtype
    if rounding_keys and (len(rounding_keys) != len(params) or dtype != torch.bfloat16):
        raise RuntimeError(
            f"rounding_keys has {len(rounding_keys)} numbers; it must have one for each of params, "
            "which must be bfloat16"
        )
    if dtype == torch.float64 and not storage.plain:
        raise RuntimeError("float64 parameters have float64 states and no masters")
    if dtype == torch.float32 and storage.masters:
        raise RuntimeError("float32 parameters need no masters")


def check_gradients(grads: Sequence[torch.Tensor]) -> None:
    """Refuse gradients that are not of one dtype and device, each dense in memory."""
    check_dtype(grads[0], "grads[0]")
    for index, grad in enumerate(grads):
        alike = grad.dtype == grads[0].dtype and grad.device == grads[0].device
        if not alike or not is_dense(grad):
            raise RuntimeError(
                f"grads[{index}] must have the dtype and device of grads[0] and fill one stretch "
                "of memory"
            )


def check_squares(squares: torch.Tensor, device: torch.device) -> None:
    """Refuse what cannot be sums of squares of tensors on ``device``."""
    if squares.dim() != 1 or not squares.is_contiguous() or squares.dtype != torch.float64:
        raise RuntimeError("squares must be a contiguous float64 tensor of one dimension")
    if squares.device != device:
        raise RuntimeError(f"squares is on {squares.device}; it must be on {device}")


def check_place(squares: torch.Tensor, place: int) -> None:
    """Refuse a place that ``squares`` does not have."""
    if not 0 <= place < squares.numel():
        raise RuntimeError(f"place is {place}; squares has {squares.numel()} numbers")


def check_number(tensor: torch.Tensor, name: str) -> None:
    """Refuse what is not one number."""
    if tensor.numel() != 1 or tensor.dtype not in _NUMBERS:
        raise RuntimeError(f"{name} must be one float32 or float64 number")


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != filled:
            return tensor.numel() == 0
        filled *= size
    return True


def same_strides(shape: Sequence[int], strides: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two tensors of one shape lie alike: a stride along one element does not count."""
    return 0 in shape or all(
        size == 1 or stride == other
        for size, stride, other in zip(shape, strides, others, strict=True)
    )
