"""One kernel call of a step, for parameters of one group, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkern.backends import choice
from effkern.ops.plan import put_gradients_
from effkern.ops.step import RuleOps, squares_from_lists, squares_from_plan
from effkern.optim.layout import as_real, is_dense, laid_out_like
from effkern.optim.plan import Plan
from effkern.optim.storage import Storage


@dataclass(frozen=True)
class Tensors:
    """What one kernel call updates.

    Attributes:
        params: of one dtype and device.
        states: for each list of states that the kernel takes, one tensor per parameter, or none.
        scales: likewise, of states in 8 bits.
        steps: one step counter per parameter, or none.
        masters: one float32 master per parameter, or none.
        rounding_keys: one per parameter, or none.
        storage: how they are stored.
    """

    params: list[Tensor]
    states: list[list[Tensor]]
    scales: list[list[Tensor]]
    steps: list[Tensor]
    masters: list[Tensor]
    rounding_keys: list[int]
    storage: Storage


class PlannedCall:
    """A call by plan: only the addresses of gradients are new at each step.

    A parameter that is not dense in memory is copied into a dense one for the update and back
    after it, for as long as the call lives.

    Args:
        rule: the ops of the update rule.
        tensors: of which no two share memory; states, scales and masters dense.
        on_cpu: whether the CPU library runs it.
    """

    def __init__(self, rule: RuleOps, tensors: Tensors, on_cpu: bool) -> None:
        params = tensors.params
        (self._kernel,) = rule.from_plan(params[0])
        (self._squares,) = squares_from_plan(params[0])
        self._dense = [p if is_dense(p) else torch.empty_like(p) for p in params]
        self._copied = [(d, p) for d, p in zip(self._dense, params, strict=True) if d is not p]
        self._places = [_place(p) for _, p in self._copied]
        self._complex = params[0].is_complex()
        reals = [list(map(as_real, one)) for one in (self._dense, *tensors.states)]
        self._plan = Plan(
            reals[0],
            reals[1:],
            tensors.steps,
            tensors.storage,
            tensors.scales,
            tensors.masters,
            tensors.rounding_keys,
            on_cpu,
        )
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
        self._kernel(*self._plan.arguments(), self._moved, **keywords)
        self._moved = False
        for dense, param in self._copied:
            param.copy_(dense)

    def prepare_for_graph(self) -> None:
        """Before the kernels, while a CUDA graph is captured."""
        if self._moved:
            self._plan.upload_for_graph()
            self._moved = False

    def squares(self, squares: Tensor, place: int) -> None:
        """Put the sum of squares of the gradients that `accept` took into ``squares[place]``."""
        self._squares(*self._plan.arguments(), self._moved, squares, place)
        self._moved = False

    def _put(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        plan = self._plan
        changed = put_gradients_(plan.table, plan.device_table, plan.layouts, params, grads)
        self._moved = self._moved or changed > 0
        return changed >= 0


class ListedCall:
    """A call by lists of tensors, for the reference backend: any strides, one after another.

    Args: as those of `PlannedCall`.
    """

    def __init__(self, rule: RuleOps, tensors: Tensors) -> None:
        self._params = tensors.params
        with choice.use_backend("reference"):
            (self._kernel,) = rule.from_lists(self._params[0])
            (self._squares,) = squares_from_lists(self._params[0])
        self._lists = [
            *(list(map(as_real, one)) for one in tensors.states),
            tensors.steps,
            tensors.masters,
            [one for of_state in tensors.scales for one in of_state],
            tensors.rounding_keys,
        ]
        self._places = list(map(_place, self._params))
        self._grads: list[Tensor] = []

    def accept(self, grads: list[Tensor]) -> list[Tensor] | None:
        """As `PlannedCall.accept`."""
        alike = list(map(_kind, grads)) == list(map(_kind, self._params))
        if not alike or list(map(_place, self._params)) != self._places:
            return None
        self._grads = list(map(as_real, grads))
        return grads

    def run(self, grads: list[Tensor], keywords: dict[str, Any]) -> None:
        """As `PlannedCall.run`."""
        self._kernel(list(map(as_real, self._params)), self._grads, *self._lists, **keywords)
        self._grads = []

    def prepare_for_graph(self) -> None:
        """As `PlannedCall.prepare_for_graph`: nothing."""

    def squares(self, squares: Tensor, place: int) -> None:
        """As `PlannedCall.squares`."""
        self._squares(squares, place, self._grads)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.stride(), *_kind(tensor)


def _materialized(tensor: Tensor) -> Tensor:
    """The same values, all of them in memory."""
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.resolve_conj().resolve_neg()
