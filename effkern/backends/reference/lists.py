"""What a multi-tensor step on lists asks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    steps: Sequence[Tensor],
    masters: Sequence[Tensor],
) -> None:
    """Refuse lists that do not belong together.

    Args:
        params: of any strides.
        grads: for each parameter one tensor of its dtype, device and shape.
        states: by argument name, the same with the parameter's dtype, or all of float32, bfloat16,
            or int8 and uint8.
        steps: one number per parameter, or none at all.
        masters: float32, of the parameters' shapes, or none at all.

    Raises:
        RuntimeError: naming the argument, what it was and what it must be.
    """
    lists = {"grads": grads, **states}
    lists.update({n: s for n, s in (("steps", steps), ("masters", masters)) if s})
    for name, tensors in lists.items():
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
            if name == "steps":
                continue
            for what in ("device", "dtype", "shape"):
                has, must = getattr(tensors[i], what), getattr(param, what)
                if what == "dtype" and name != "grads":
                    dtypes = (torch.float32,) if name == "masters" else (must, *_OF_STATES)
                    fits = has in dtypes and has == tensors[0].dtype
                else:
                    fits = has == must
                if not fits:
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


_OF_STATES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
_COUNTERS = (torch.float32, torch.float64)
