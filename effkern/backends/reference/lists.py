"""What a multi-tensor step on lists asks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_lists(
    params: Sequence[Tensor], lists: Mapping[str, Sequence[Tensor]], steps: Sequence[Tensor]
) -> None:
    """Refuse lists that do not belong together.

    Args:
        params: of any strides.
        lists: by argument name, the gradients and the states: for each parameter one tensor of its
            dtype, device and shape.
        steps: one number per parameter, or none at all.

    Raises:
        RuntimeError: naming the argument, what it was and what it must be.
    """
    counted = [("steps", steps)] if steps else []
    for name, tensors in (*lists.items(), *counted):
        if len(tensors) != len(params):
            raise RuntimeError(
                f"{name} has {len(tensors)} tensors; it must have as many as params, {len(params)}"
            )
    for i, param in enumerate(params):
        if param.dtype not in _DTYPES:
            raise RuntimeError(
                f"params[{i}] has dtype {param.dtype}; "
                "it must be float32, float64, bfloat16 or float16"
            )
        if param.dtype != params[0].dtype or param.device != params[0].device:
            raise RuntimeError(
                f"params[{i}] has another dtype or device than params[0]; "
                "one call takes one of each"
            )
        for name, tensors in lists.items():
            for what in ("device", "dtype", "shape"):
                has, must = getattr(tensors[i], what), getattr(param, what)
                if has != must:
                    raise RuntimeError(
                        f"{name}[{i}] has {what} {has}; it must have that of its parameter, {must}"
                    )
        if not steps:
            continue
        step = steps[i]
        device_fits = step.is_cpu or step.device == param.device
        if not device_fits or step.numel() != 1 or step.dtype not in _COUNTERS:
            raise RuntimeError(
                f"steps[{i}] must be one number, float32 or float64, on the CPU or on the "
                "parameters' device"
            )


_COUNTERS = (torch.float32, torch.float64)
