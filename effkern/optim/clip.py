"""Clipping gradients by their norm, outside of a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effkern.ops.step import squares_from_lists
from effkern.optim.layout import as_real, is_dense

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

    Args:
        parameters: one or many, of any dtypes and devices, with or without gradients.
        max_norm: the largest norm that is left as it is.
        norm_type: which norm; for others than 2 torch's function is called.
        error_if_nonfinite: raise where the norm is infinite or NaN.
        foreach: passed on to torch's function; accepted and ignored for the 2-norm.

    Returns:
        The norm of all gradients together before clipping, 0-dim: float32, float64 with float64
        gradients; on the device of the first gradient.

    Raises:
        RuntimeError: for a norm that is not finite, with ``error_if_nonfinite``.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    plain = all(type(g) is Tensor and g.layout == torch.strided for g in grads)
    if float(norm_type) != 2.0 or not grads or not plain or not _served(grads):
        return torch.nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach
        )
    by_kind: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    first = grads[0].device
    sums = []
    for (device, _), alike in by_kind.items():
        dense = [as_real(g if is_dense(g) else g.contiguous()).resolve_neg() for g in alike]
        sums.append(torch.zeros(1, dtype=torch.float64, device=device))
        (kernel,) = squares_from_lists(dense[0])
        kernel(sums[-1], 0, dense)
    norm = torch.cat([one.to(first, non_blocking=True) for one in sums]).sum().sqrt()
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is "
            "non-finite, so it cannot be clipped. To disable this error and scale the gradients by "
            "the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    factor = torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0)
    if not (norm.is_cpu and factor == 1):
        for (device, dtype), alike in by_kind.items():
            wide = dtype in (torch.float64, torch.complex128)
            at = factor.to(device, torch.float64 if wide else torch.float32, non_blocking=True)
            torch._foreach_mul_(alike, at)
    wide = any(g.dtype in (torch.float64, torch.complex128) for g in grads)
    return norm if wide else norm.float()


def _served(grads: list[Tensor]) -> bool:
    """Whether the kernels take all of these dtypes."""
    taken = (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
        torch.complex128,
    )
    return all(g.dtype in taken and not g._is_zerotensor() for g in grads)
