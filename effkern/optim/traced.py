"""A step inside torch.compile: the ops on lists of tensors, which a graph can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effkern.optim.layout import as_real, is_dense, laid_out_like
from effkern.optim.scaling import step_keywords

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
        steps: their step counters; empty where none is kept.
        states: for each list that the kernel takes, one tensor per parameter, or none.
    """
    by_kind: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        counter = (steps[i].dtype, steps[i].device) if steps else None
        by_kind.setdefault((param.device, param.dtype, counter), []).append(i)
    for which in by_kind.values():
        chosen = [params[i] for i in which]
        dense = [p if is_dense(p) else torch.empty_like(p).copy_(p) for p in chosen]
        alike = [laid_out_like(grads[i], d) for i, d in zip(which, dense, strict=True)]
        lists = [[as_real(of_kind[i]) for i in which if of_kind] for of_kind in states]
        counters = [steps[i] for i in which if steps]
        (kernel,) = optimizer._rule.from_lists(dense[0])
        kernel(
            [as_real(d) for d in dense],
            [as_real(grad) for grad in alike],
            *lists,
            counters,
            [],
            [],
            [],
            **step_keywords(optimizer, group, dense[0].device),
        )
        for param, updated in zip(chosen, dense, strict=True):
            if updated is not param:
                param.copy_(updated)
