"""The base of every fused optimizer: state, plans, and one kernel call for all parameters of a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _get_scalar_dtype

from effkern.ops._declare import Family
from effkern.optim.checks import check_grad, check_param
from effkern.optim.prepared import Prepared


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
        self._prepared: list[Prepared | None] = []
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
            check_param(self, group, param)
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
        elif not (isinstance(step, Tensor) and step.is_cpu and step.dim() == 0 and step.dtype in (torch.float32, torch.float64)):
            state["step"] = torch.tensor(float(step), dtype=_get_scalar_dtype())
        for name in self._state_names(group):
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _prepare(self) -> list[tuple[dict[str, Any], Prepared, list[Tensor]]]:
        """For every group what to run and the gradients to run it on. Refuses here, before anything is written."""
        if len(self._prepared) != len(self.param_groups):
            self._prepared = [None] * len(self.param_groups)
        ready = []
        for i, group in enumerate(self.param_groups):
            prepared = self._prepared[i]
            grads = prepared.current_grads(group) if prepared is not None else None
            if prepared is None or grads is None:
                prepared = self._prepared[i] = Prepared(self, group)
                grads = [param.grad for param in prepared.params]
            ready.append((group, prepared, grads))
        if sum(len(prepared.calls) for _, prepared, _ in ready) > 1:
            # A call checks its own gradients before it writes; of several, none may write before all are checked.
            for group, prepared, grads in ready:
                for param, grad in zip(prepared.params, grads, strict=True):
                    if grad.dtype != param.dtype or grad.shape != param.shape or grad.layout != torch.strided:
                        check_grad(self, group, param, grad)
        return ready
