"""What a group's steps keep between calls, and when it no longer holds."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effkern.backends import choice
from effkern.optim.checks import check_grad, check_param
from effkern.optim.plan import Plan

if TYPE_CHECKING:
    from effkern.optim.fused import FusedOptimizer


class Prepared:
    """What one group's steps need, as long as nobody moves or replaces a tensor.

    Parameters are sorted into calls of one dtype and device each. Those that no plan can hold (a backend without
    plans, or tensors whose elements do not lie alike in memory) go through the op on lists.
    """

    def __init__(self, optimizer: FusedOptimizer, group: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.group = group
        self.options = tuple(optimizer._state_names(group))
        self.all_params = list(group["params"])
        self.params: list[Tensor] = []
        self.without_grad: list[Tensor] = []
        for index, param in enumerate(self.all_params):
            if param.grad is None:
                self.without_grad.append(param)
            else:
                check_param(optimizer, group, param)
                check_grad(optimizer, group, param, param.grad)
                self.params.append(param)
        self.choice = choice.requested()
        # All checks passed: state may be made now.
        self.states = [optimizer._state_of(group, param) for param in self.params]
        sorted_by: dict[tuple[Any, ...], list[int]] = {}
        for position, (param, state) in enumerate(zip(self.params, self.states, strict=True)):
            backend = choice.serving(param.device.type)
            planned = backend != "reference" and _lie_alike(param, [state[name] for name in self.options])
            key = (planned, backend, param.device, param.dtype, state["step"].dtype)
            sorted_by.setdefault(key, []).append(position)
        self.calls = [
            _Planned(self, positions, backend) if planned else _Listed(self, positions)
            for (planned, backend, *_), positions in sorted_by.items()
        ]

    def current_grads(self, group: dict[str, Any]) -> list[Tensor] | None:
        """The gradients for this step; None where what was prepared no longer holds."""
        params = group["params"]
        if (
            group is not self.group
            or len(params) != len(self.all_params)
            or not all(map(is_, params, self.all_params))
            or self.options != self.optimizer._state_names(group)
            or self.choice != choice.requested()
            or any(param.grad is not None for param in self.without_grad)
        ):
            return None
        grads = [param.grad for param in self.params]
        if not set(map(type, grads)) <= _PLAIN:
            return None
        state = self.optimizer.state
        if any(state.get(p) is not s for p, s in zip(self.params, self.states, strict=True)):
            return None
        return grads if all(call.is_current() for call in self.calls) else None

    def run(self, grads: list[Tensor], scalars: dict[str, Any]) -> None:
        for call in self.calls:
            call.run(grads if len(call.positions) == len(grads) else [grads[i] for i in call.positions], scalars)


_PLAIN = {Tensor, torch.nn.Parameter}


class _Planned:
    """A call by plan."""

    def __init__(self, prepared: Prepared, positions: list[int], backend: str) -> None:
        self.positions = positions
        self._prepared = prepared
        self._params = [prepared.params[i] for i in positions]
        self._holders = [prepared.states[i] for i in positions]
        self._names = (*prepared.options, "step")
        states = [[state[name] for state in self._holders] for name in prepared.options]
        steps = [state["step"] for state in self._holders]
        self._plan = Plan(self._params, states, steps, backend)
        (self._kernel,) = prepared.optimizer._from_plan(self._params[0])

    def is_current(self) -> bool:
        held = chain(self._params, *([s.get(name) for s in self._holders] for name in self._names))
        return all(map(is_, held, self._plan.tensors)) and self._plan.is_current()

    def run(self, grads: list[Tensor], scalars: dict[str, Any]) -> None:
        plan = self._plan
        torch.autograd.graph.increment_version(plan.tensors)
        tables = (plan.table, plan.device_table, plan.chunks, plan.layouts)
        if self._kernel(*tables, grads, **scalars) >= 0:
            # Some gradient does not lie in memory as its parameter does; nothing was written yet.
            optimizer, group = self._prepared.optimizer, self._prepared.group
            for param, grad in zip(self._params, grads, strict=True):
                check_grad(optimizer, group, param, grad)
            alike = [_laid_out_like(g, p) for g, p in zip(grads, self._params, strict=True)]
            if self._kernel(*tables, alike, **scalars) >= 0:
                raise RuntimeError("a gradient changed while the step was running")


class _Listed:
    """A call by lists, one parameter after another in plain PyTorch."""

    def __init__(self, prepared: Prepared, positions: list[int]) -> None:
        self.positions = positions
        self._optimizer = prepared.optimizer
        self._params = [prepared.params[i] for i in positions]
        self._holders = [prepared.states[i] for i in positions]
        self._names = prepared.options

    def is_current(self) -> bool:
        return True

    def run(self, grads: list[Tensor], scalars: dict[str, Any]) -> None:
        states = [[state[name] for state in self._holders] for name in self._names]
        steps = [state["step"] for state in self._holders]
        with choice.use_backend("reference"):
            (kernel,) = self._optimizer._from_lists(self._params[0])
        kernel(self._params, grads, *self._optimizer._list_arguments(states), steps, **scalars)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order of dimensions."""
    return torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _lie_alike(param: Tensor, states: list[Tensor]) -> bool:
    return _is_dense(param) and all(
        s.dtype == param.dtype
        and s.device == param.device
        and s.shape == param.shape
        and (s.stride() == param.stride() or (s.is_contiguous() and param.is_contiguous()))
        for s in states
    )


def _laid_out_like(grad: Tensor, param: Tensor) -> Tensor:
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param, memory_format=torch.preserve_format).copy_(grad)
