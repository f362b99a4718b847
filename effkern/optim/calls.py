"""One kernel call of a step, for parameters of one group, dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.optim.layout import is_dense, laid_out_like
from effkern.optim.plan import Plan


class PlannedCall:
    """A call by plan: only the gradients cross over at each step.

    A parameter that is not dense in memory is copied into a dense one for the update and back
    after it, for as long as the call lives.

    Args:
        kernel: the op on plans.
        params: of one dtype and device; no two share memory.
        states: for each kind of state, one dense tensor per parameter.
        steps: one step counter per parameter.
        on_cpu: whether the CPU library runs it.
    """

    def __init__(
        self,
        kernel: torch._ops.OpOverload,
        params: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
        on_cpu: bool,
    ) -> None:
        self._kernel = kernel
        self._dense = [p if is_dense(p) else torch.empty_like(p) for p in params]
        self._copied = [(d, p) for d, p in zip(self._dense, params, strict=True) if d is not p]
        plan = Plan(self._dense, states, steps, on_cpu)
        self._tables = (plan.table, plan.device_table, plan.chunks, plan.layouts)

    def run(self, grads: list[Tensor], scalars: dict[str, Any]) -> bool:
        """Update the parameters.

        Args:
            grads: one per parameter, of its shape, dtype and device, with any strides.
            scalars: the kernel's keyword arguments.

        Returns:
            False if some gradient is not as the plan has it; then nothing was written.
        """
        for dense, param in self._copied:
            dense.copy_(param)
        done = self._kernel(*self._tables, grads, **scalars) < 0
        if not done:
            alike = [laid_out_like(g, d) for g, d in zip(grads, self._dense, strict=True)]
            done = self._kernel(*self._tables, alike, **scalars) < 0
        if done:
            for dense, param in self._copied:
                param.copy_(dense)
        return done


class ListedCall:
    """A call by lists of tensors, for the reference backend: any strides, one after another.

    Args:
        kernel: the op on lists.
        params: of one dtype and device.
        states: all lists of state tensors that the kernel takes.
        steps: one step counter per parameter.
    """

    def __init__(
        self,
        kernel: torch._ops.OpOverload,
        params: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
    ) -> None:
        self._kernel = kernel
        self._params, self._states, self._steps = params, states, steps

    def run(self, grads: list[Tensor], scalars: dict[str, Any]) -> bool:
        """Update the parameters; always True. Arguments as those of `PlannedCall.run`."""
        self._kernel(self._params, grads, *self._states, self._steps, **scalars)
        return True
