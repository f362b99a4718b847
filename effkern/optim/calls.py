"""One kernel call of a step, for parameters of one group, dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops.plan import put_gradients_
from effkern.optim.layout import as_real, is_dense, laid_out_like
from effkern.optim.plan import Plan


class PlannedCall:
    """A call by plan: only the addresses of gradients are new at each step.

    A parameter that is not dense in memory is copied into a dense one for the update and back
    after it, for as long as the call lives.

    Args:
        kernel: the op on plans.
        params: of one dtype and device; no two share memory.
        states: for each list of states that the kernel takes, one dense tensor per parameter, or
            none.
        steps: one step counter per parameter, or none.
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
        self._places = [_place(p) for _, p in self._copied]
        self._complex = params[0].is_complex()
        reals = [list(map(as_real, tensors)) for tensors in (self._dense, *states)]
        self._plan = Plan(reals[0], reals[1:], steps, on_cpu)
        self._moved = False

    def accept(self, grads: list[Tensor]) -> list[Tensor] | None:
        """Take the gradients of a step; nothing is updated yet.

        Args:
            grads: one per parameter, of its shape, dtype and device, with any strides.

        Returns:
            What must be kept until `run` is done; None if the parameters, or these gradients, are
            not as the plan has them.
        """
        if [_place(p) for _, p in self._copied] != self._places:
            return None
        params = self._dense
        if self._complex:
            if not all(t.is_complex() for t in (*params, *grads)):
                return None
            params, grads = list(map(as_real, params)), list(map(as_real, grads))
        if not self._put(params, grads):
            pairs = zip(grads, params, strict=True)
            grads = [laid_out_like(_materialized(grad), like) for grad, like in pairs]
            if not self._put(params, grads):
                return None
        return grads

    def run(self, grads: list[Tensor], keywords: dict[str, Any]) -> None:
        """Update the parameters.

        Args:
            grads: what `accept` gave.
            keywords: the kernel's keyword arguments.
        """
        for dense, param in self._copied:
            dense.copy_(param)
        plan = self._plan
        self._kernel(
            plan.table, plan.device_table, plan.chunks, plan.layouts, self._moved, **keywords
        )
        self._moved = False
        for dense, param in self._copied:
            param.copy_(dense)

    def _put(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        plan = self._plan
        changed = put_gradients_(plan.table, plan.device_table, plan.layouts, params, grads)
        self._moved = self._moved or changed > 0
        return changed >= 0


class ListedCall:
    """A call by lists of tensors, for the reference backend: any strides, one after another.

    Args: as those of `PlannedCall`, with the op on lists.
    """

    def __init__(
        self,
        kernel: torch._ops.OpOverload,
        params: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
    ) -> None:
        self._kernel = kernel
        self._params, self._steps = params, steps
        self._states = [list(map(as_real, tensors)) for tensors in states]
        self._places = list(map(_place, params))

    def accept(self, grads: list[Tensor]) -> list[Tensor] | None:
        """As `PlannedCall.accept`."""
        alike = list(map(_kind, grads)) == list(map(_kind, self._params))
        return grads if alike and list(map(_place, self._params)) == self._places else None

    def run(self, grads: list[Tensor], keywords: dict[str, Any]) -> None:
        """As `PlannedCall.run`."""
        params, grads = list(map(as_real, self._params)), list(map(as_real, grads))
        self._kernel(params, grads, *self._states, self._steps, [], [], [], **keywords)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.stride(), *_kind(tensor)


def _materialized(tensor: Tensor) -> Tensor:
    """The same values, all of them in memory."""
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.resolve_conj().resolve_neg()
