"""What the fused optimizers refuse, and how they name it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from effkern.optim.plan import DTYPE_CODES


def name_of(group: dict[str, Any], param: Tensor) -> str:
    index = next(i for i, p in enumerate(group["params"]) if p is param)
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} of its group"


def check_param(optimizer: Optimizer, group: dict[str, Any], param: Tensor) -> None:
    kind = type(optimizer).__name__
    if param.dtype not in DTYPE_CODES:
        raise RuntimeError(
            f"{kind}: {name_of(group, param)} must be float32, float64, bfloat16 or float16, got {param.dtype}"
        )
    if param.layout != torch.strided:
        raise RuntimeError(f"{kind}: {name_of(group, param)} must be a dense tensor, got layout {param.layout}")


def check_grad(optimizer: Optimizer, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
    kind = type(optimizer).__name__
    if grad.layout != torch.strided:
        raise RuntimeError(f"{kind} does not support sparse gradients: that of {name_of(group, param)} is {grad.layout}")
    for what, has, must in (
        ("dtype", grad.dtype, param.dtype),
        ("device", grad.device, param.device),
        ("shape", tuple(grad.shape), tuple(param.shape)),
    ):
        if has != must:
            raise RuntimeError(f"{kind}: the gradient of {name_of(group, param)} must have {what} {must}, got {has}")
