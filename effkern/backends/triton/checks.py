"""What the kernels rely on, checked before anything is written: csrc/torch's errors, in Python.

Callers of the public functions have passed stricter checks; these are for those who call the
kernel ops themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effkern.backends.triton.numerics import TRITON_DTYPE

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


def check_like(tensor: torch.Tensor, name: str, like: torch.Tensor, like_name: str) -> None:
    """Refuse a tensor that has not the device, dtype and shape of ``like``."""
    check_device(tensor, name, like, like_name)
    if tensor.dtype != like.dtype:
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
    lists: dict[str, Sequence[torch.Tensor]],
    steps: Sequence[torch.Tensor],
) -> None:
    """Refuse lists that do not belong to one multi-tensor step.

    ``lists``: by argument name, the gradients and states, one tensor per parameter in each;
    ``steps``: a number for each parameter, or none at all.
    """
    for name, tensors in [*lists.items(), *([("steps", steps)] if steps else [])]:
        if len(tensors) != len(params):
            raise RuntimeError(
                f"{name} has {len(tensors)} tensors; it must have as many as params, {len(params)}"
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
        for name, tensors in lists.items():
            check_like(tensors[index], f"{name}[{index}]", param, "its parameter")
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
