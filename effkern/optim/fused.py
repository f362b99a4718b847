"""The base of every fused optimizer: state, plans, and one kernel call for all parameters of a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _get_scalar_dtype

from effkern.backends import choice
from effkern.ops._declare import Family
from effkern.optim.plan import DTYPE_CODES, Plan


class FusedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose step is one multi-tensor kernel call for each dtype and device of a group.

    A subclass is one update rule. It names the kernel ops and says which state tensors a group keeps and which
    scalars its step takes.
    """

    #: The rule's kernel op on lists of tensors, and on a plan.
    _from_lists: Family
    _from_plan: Family

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if defaults["differentiable"]:
            raise RuntimeError(
                f"{type(self).__name__} does not support differentiable=True: its step runs in fused kernels"
            )
        if defaults["capturable"]:
            raise RuntimeError(f"{type(self).__name__} does not support capturable=True: its step counters are on the host")
        self._prepared: list[_Prepared | None] = []
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepared = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._prepared = []

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The keys of the state tensors of a parameter of ``group``, in the order of the kernel's arguments."""
        raise NotImplementedError

    def _scalars(self, group: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the kernel that are not tensors."""
        raise NotImplementedError

    def _list_arguments(self, states: Sequence[list[Tensor]]) -> Sequence[list[Tensor]]:
        """The states as the op on lists takes them: an empty list for each kind that a group may lack."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: if a parameter or gradient is of a kind that the kernels do not take; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            for group in self.param_groups:
                self._step_traced(group)
            return loss
        self._refuse_graph_capture()
        ready = self._prepare()
        for group, prepared, grads in ready:
            prepared.run(grads, self._scalars(group))
        return loss

    def _refuse_graph_capture(self) -> None:
        """PyTorch's own check that nobody captures a step with its counters on the host."""
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if check := getattr(self, name, None):
                return check()

    # ---- the compiled step ----

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], steps: list[Tensor], *states: list[Tensor]
    ) -> None:
        """Fill the lists with every parameter that has a gradient, its gradient and its state.

        Dynamo runs this method by its name, outside the graph, and takes what it lists as inputs of the graph.
        """
        names = self._state_names(group)
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            _check_param(self, group, index, param)
            state = self._state_of(group, param)
            params.append(param)
            grads.append(param.grad)
            steps.append(state["step"])
            for name, tensors in zip(names, states, strict=True):
                tensors.append(state[name])

    def _step_traced(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        steps: list[Tensor] = []
        states: list[list[Tensor]] = [[] for _ in self._state_names(group)]
        self._init_group(group, params, grads, steps, *states)
        if params:
            (kernel,) = self._from_lists(params[0])
            kernel(params, grads, *self._list_arguments(states), steps, **self._scalars(group))

    # ---- the eager step ----

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """A parameter's state, made at its first step; a step counter from elsewhere is brought to the host."""
        state: dict[str, Any] = self.state[param]
        step = state.get("step")
        if step is None:
            state["step"] = torch.tensor(0.0, dtype=_get_scalar_dtype())
        elif not (isinstance(step, Tensor) and step.is_cpu and step.dim() == 0 and step.dtype in _STEP_DTYPES):
            state["step"] = torch.tensor(float(step), dtype=_get_scalar_dtype())
        for name in self._state_names(group):
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _prepare(self) -> list[tuple[dict[str, Any], _Prepared, list[Tensor]]]:
        """For every group what to run and the gradients to run it on. Refuses here, before anything is written."""
        if len(self._prepared) != len(self.param_groups):
            self._prepared = [None] * len(self.param_groups)
        ready = []
        for i, group in enumerate(self.param_groups):
            prepared = self._prepared[i]
            grads = prepared.current_grads(group) if prepared is not None else None
            if prepared is None or grads is None:
                prepared = self._prepared[i] = _Prepared(self, group)
                grads = [param.grad for param in prepared.params]
            ready.append((group, prepared, grads))
        if sum(len(prepared.calls) for _, prepared, _ in ready) > 1:
            # A call checks its own gradients before it writes; of several, none may write before all are checked.
            for group, prepared, grads in ready:
                for param, grad in zip(prepared.params, grads, strict=True):
                    if grad.dtype != param.dtype or grad.shape != param.shape or grad.layout != torch.strided:
                        _check_grad(self, group, param, grad)
        return ready


_STEP_DTYPES = (torch.float32, torch.float64)


class _Prepared:
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
                _check_param(optimizer, group, index, param)
                _check_grad(optimizer, group, param, param.grad)
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

    def __init__(self, prepared: _Prepared, positions: list[int], backend: str) -> None:
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
                _check_grad(optimizer, group, param, grad)
            alike = [_laid_out_like(g, p) for g, p in zip(grads, self._params, strict=True)]
            if self._kernel(*tables, alike, **scalars) >= 0:
                raise RuntimeError("a gradient changed while the step was running")


class _Listed:
    """A call by lists, one parameter after another in plain PyTorch."""

    def __init__(self, prepared: _Prepared, positions: list[int]) -> None:
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
    return torch._prims_common.is_non_overlapping_and_dense(tensor)


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


def _name(group: dict[str, Any], param: Tensor) -> str:
    index = next(i for i, p in enumerate(group["params"]) if p is param)
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} of its group"


def _check_param(optimizer: Optimizer, group: dict[str, Any], index: int, param: Tensor) -> None:
    kind = type(optimizer).__name__
    if param.dtype not in DTYPE_CODES:
        raise RuntimeError(
            f"{kind}: {_name(group, param)} must be float32, float64, bfloat16 or float16, got {param.dtype}"
        )
    if param.layout != torch.strided:
        raise RuntimeError(f"{kind}: {_name(group, param)} must be a dense tensor, got layout {param.layout}")


def _check_grad(optimizer: Optimizer, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
    kind = type(optimizer).__name__
    if grad.layout != torch.strided:
        raise RuntimeError(f"{kind} does not support sparse gradients: that of {_name(group, param)} is {grad.layout}")
    for what, has, must in (
        ("dtype", grad.dtype, param.dtype),
        ("device", grad.device, param.device),
        ("shape", tuple(grad.shape), tuple(param.shape)),
    ):
        if has != must:
            raise RuntimeError(f"{kind}: the gradient of {_name(group, param)} must have {what} {must}, got {has}")
