"""The keyword arguments of a step, among them what may be tensors: learning rate and scale."""

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

    A learning rate in a tensor on the CPU is read here; one on a GPU is left for the kernel to
    read, so that nobody waits.
    """
    lr = group["lr"]
    keywords = optimizer._options(group)
    if isinstance(lr, Tensor) and not lr.is_cpu:
        keywords["lr"] = 0.0
        keywords["lr_tensor"] = _number(lr, device)
    else:
        keywords["lr"] = float(lr)
    return {**keywords, **_scaling(optimizer, device)}


def tensor_keywords(
    optimizer: FusedOptimizer, lr: Tensor | None, device: torch.device
) -> dict[str, Tensor]:
    """Those that are tensors, as a compiled graph takes them."""
    keywords = _scaling(optimizer, device)
    if lr is not None:
        keywords["lr_tensor"] = _number(lr, lr.device if lr.is_cpu else device)
    return keywords


def deferred_keywords(
    optimizer: FusedOptimizer, group: dict[str, Any], tensors: dict[str, Tensor | None]
) -> dict[str, Any]:
    """All of them when a compiled graph runs, which has brought along ``tensors``."""
    keywords: dict[str, Any] = {**optimizer._options(group), **tensors, "lr": 0.0}
    if keywords["lr_tensor"] is None:
        keywords["lr"] = float(group["lr"])
    if keywords["squares"] is not None:
        keywords["max_norm"] = float(optimizer.max_grad_norm or 0.0)
    return keywords


def _scaling(optimizer: FusedOptimizer, device: torch.device) -> dict[str, Tensor]:
    """What a GradScaler has set for the time of a step."""
    grad_scale, found_inf = optimizer._scaling()
    both = {"grad_scale": grad_scale, "found_inf": found_inf}
    return {name: _number(value, device) for name, value in both.items() if value is not None}


def _number(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of one number as the kernels take it, without waiting for a device."""
    dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
    return value.detach().to(device=device, dtype=dtype, non_blocking=True)
