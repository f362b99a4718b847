"""The keyword arguments of a step that may be tensors: learning rate and gradient scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from effkern.optim.fused import FusedOptimizer


def step_keywords(
    optimizer: FusedOptimizer, group: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """All keyword arguments of the kernel for one group's parameters on ``device``.

    A learning rate in a tensor on the CPU is read here, except in a compiled graph, which takes it
    as an input; one on a GPU is left for the kernel to read, so that nobody waits.
    """
    lr = group["lr"]
    keywords = optimizer._options(group)
    if isinstance(lr, Tensor) and (torch.compiler.is_compiling() or not lr.is_cpu):
        keywords["lr"] = 0.0
        keywords["lr_tensor"] = _number(lr, lr.device if lr.is_cpu else device)
    else:
        keywords["lr"] = float(lr)
    for name, value in zip(("grad_scale", "found_inf"), optimizer._scaling(), strict=True):
        if value is not None:
            keywords[name] = _number(value, device)
    return keywords


def _number(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of one number as the kernels take it, without waiting for a device."""
    dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
    return value.detach().to(device=device, dtype=dtype, non_blocking=True)
