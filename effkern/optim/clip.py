"""Clipping gradients by their norm, outside of a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effkern.optim.distributed import (
    PLAIN,
    is_dtensor,
    local_tensor,
    replicated,
    sharding_of,
    summed_up,
)
from effkern.optim.layout import as_real, is_dense
from effkern.optim.norm import GradientList, squares_of

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` with the norm in one pass over all gradients.

    Gradients are multiplied in place by ``max_norm / (norm + 1e-6)`` where that is less than 1; on
    the CPU they are left alone where it is not. The norm is summed in float64 in a fixed order.

    Of gradients that are DTensors each process reads and scales what it has, and their squares are
    summed over the shards: one collective for each dimension of a mesh that occurs, whatever the
    placements, which may differ, as may the meshes. Those that are not yet summed up (Partial) are
    for the norm, and stay so.

    Args:
        parameters: one or many, of any dtypes and devices, with or without gradients.
        max_norm: the largest norm that is left as it is.
        norm_type: which norm; for others than 2 torch's function is called.
        error_if_nonfinite: raise where the norm is infinite or NaN.
        foreach: passed on to torch's function; accepted and ignored for the 2-norm.

    Returns:
        The norm of all gradients together before clipping, 0-dim: float32, float64 with float64
        gradients; on the device of the first gradient. With DTensors it is one too, as in torch,
        of the mesh of the first of them; here it is replicated, so ``item()`` is the whole norm.

    Raises:
        RuntimeError: for a norm that is not finite, with ``error_if_nonfinite``; on a process that
            is not part of a gradient's mesh.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    # Whether torch's function is called, each process must decide alike.
    if float(norm_type) != 2.0 or not grads or not all(map(_served, grads)):
        return torch.nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach
        )
    by_kind: dict[Any, list[Tensor]] = {}
    scaled: dict[Any, list[Tensor]] = {}
    for grad in grads:
        local, total = local_tensor(grad), summed_up(grad)
        scaled.setdefault((local.device, local.dtype), []).append(local)
        kind = (local.device, local.dtype, sharding_of(total))
        by_kind.setdefault(kind, []).append(local_tensor(total))
    parts = [
        GradientList(device, sharding, list(map(_readable, alike)))
        for (device, _, sharding), alike in by_kind.items()
    ]
    norm = squares_of(parts).sum().sqrt()
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is "
            "non-finite, so it cannot be clipped. To disable this error and scale the gradients by "
            "the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    factor = torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0)
    distributed = [grad for grad in grads if is_dtensor(grad)]
    # A graph does not wait for the norm.
    if torch.compiler.is_compiling() or not (norm.is_cpu and factor == 1):
        for (device, dtype), alike in scaled.items():
            wide = torch.float64 if dtype in _WIDE else torch.float32
            at = factor.to(device, wide, non_blocking=True)
            torch._foreach_mul_(alike, at)
        if distributed:
            torch.autograd.graph.increment_version(distributed)
    norm = norm if any(dtype in _WIDE for _, dtype in scaled) else norm.float()
    return replicated(norm, distributed[0]) if distributed else norm


_WIDE = (torch.float64, torch.complex128)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64, *_WIDE)


def _served(grad: Tensor) -> bool:
    """Whether the kernels take a gradient."""
    local = local_tensor(grad)
    plain = type(local) in PLAIN and local.layout == torch.strided
    # Dynamo cannot trace the last question.
    asked = not is_dtensor(grad) and not torch.compiler.is_compiling()
    return plain and local.dtype in _DTYPES and not (asked and local._is_zerotensor())


def _readable(grad: Tensor) -> Tensor:
    """The same values, real and dense in memory."""
    return as_real(grad if is_dense(grad) else grad.contiguous()).resolve_neg()
