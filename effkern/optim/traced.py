"""A step inside torch.compile: the ops on lists of tensors, which a graph can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effkern.optim.layout import is_dense, laid_out_like

if TYPE_CHECKING:
    from effkern.optim.fused import FusedOptimizer


def step_lists(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    states: list[list[Tensor]],
) -> None:
    """Update the parameters of one group, one kernel call for each dtype and device.

    Args:
        optimizer: whose update rule it is.
        group: the parameter group.
        params: the parameters that have a gradient.
        grads: their gradients.
        steps: their step counters.
        states: for each kind of state, a list of one tensor per parameter.
    """
    by_kind: dict[Any, list[int]] = {}
    for i, (param, step) in enumerate(zip(params, steps, strict=True)):
        by_kind.setdefault((param.device, param.dtype, step.dtype), []).append(i)
    lr, scalars = group["lr"], optimizer._scalars(group)
    for which in by_kind.values():
        chosen = [params[i] for i in which]
        dense = [p if is_dense(p) else torch.empty_like(p).copy_(p) for p in chosen]
        alike = [laid_out_like(grads[i], d) for i, d in zip(which, dense, strict=True)]
        of_name = [[state[i] for i in which] for state in states]
        if isinstance(lr, Tensor):
            kernel = optimizer._scheduled
        else:
            (kernel,) = optimizer._from_lists(dense[0])
        lists = optimizer._list_arguments(of_name)
        kernel(dense, alike, *lists, [steps[i] for i in which], lr=lr, **scalars)
        for param, updated in zip(chosen, dense, strict=True):
            if updated is not param:
                param.copy_(updated)
