"""The base of every fused optimizer: its state, and the step that every update rule shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from effkern.ops._declare import Family
from effkern.optim.checks import check_grad, check_param, check_state
from effkern.optim.prepared import Prepared
from effkern.optim.state import complete, step_counter
from effkern.optim.traced import step_lists


class FusedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that updates all parameters of a group in one kernel call.

    One call for each dtype and device, to be exact. A subclass is one update rule: it names the
    kernel ops and says which state tensors a group keeps and which scalars its step takes.
    """

    #: The rule's kernel op on lists of tensors, on a plan, and on lists with lr in a tensor.
    _from_lists: Family
    _from_plan: Family
    _scheduled: Callable[..., None]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        kind = type(self).__name__
        if defaults["differentiable"]:
            raise RuntimeError(
                f"{kind} does not support differentiable=True: its step runs in fused kernels"
            )
        if defaults["capturable"]:
            raise RuntimeError(
                f"{kind} does not support capturable=True: its step counters are on the host"
            )
        self._prepared: Prepared | None = None
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepared = None
        for of_param in self.state.values():
            # PyTorch before 1.12 kept step as a number.
            if isinstance(of_param.get("step"), (int, float)):
                of_param["step"] = step_counter(of_param["step"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The keys of a parameter's state tensors, in the order of the kernel's arguments."""
        raise NotImplementedError

    def _scalars(self, group: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the kernel, without ``lr``."""
        raise NotImplementedError

    def _list_arguments(self, states: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """The states as the op on lists takes them: an empty list for a kind that is not kept."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: if a parameter, a gradient or a state is refused; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            for group in self.param_groups:
                self._step_traced(group)
        else:
            self._step_eagerly()
        return loss

    def _step_eagerly(self) -> None:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__} cannot step while a CUDA graph is captured: its step "
                "counters are on the host"
            )
        prepared = self._prepared
        accepted = None if prepared is None else self._accept(prepared)
        if prepared is None or accepted is None:
            # What the old one keeps of tensors goes before new ones are made.
            prepared = self._prepared = None
            prepared = self._prepared = Prepared(self)
            accepted = self._accept(prepared)
            if accepted is None:
                raise RuntimeError(f"{type(self).__name__}: a tensor was moved while the step ran")
        prepared.run(self, accepted)

    def _accept(self, prepared: Prepared) -> list[list[Tensor]] | None:
        try:
            return prepared.accept(self)
        except RuntimeError:
            self._check_grads()  # names the gradient, if that is what was refused
            raise

    def _check_grads(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    check_grad(self, group, param, param.grad)

    # ---- the compiled step ----

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Fill the lists with every parameter that has a gradient, its gradient and its state.

        Dynamo knows this method by its name: it runs it once, outside the graph, and takes what it
        lists as inputs of the graph.
        """
        names = self._state_names(group)
        chosen = [param for param in group["params"] if param.grad is not None]
        for param in chosen:
            check_param(self, group, param)
            check_grad(self, group, param, param.grad)
            check_state(self, group, param, names)
        for param in chosen:
            state = self.state[param]
            complete(state, param, names)
            params.append(param)
            grads.append(param.grad)
            steps.append(state["step"])
            for name, tensors in zip(names, states, strict=True):
                tensors.append(state[name])

    # Under another name Dynamo traces it like any method: slower to compile, but it may then
    # follow a backward in the same graph.
    _init_group_in_graph = _init_group

    def _step_traced(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        steps: list[Tensor] = []
        states: list[list[Tensor]] = [[] for _ in self._state_names(group)]
        if getattr(torch._dynamo.config, "trace_autograd_ops", False):
            self._init_group_in_graph(group, params, grads, steps, *states)
        else:
            self._init_group(group, params, grads, steps, *states)
        step_lists(self, group, params, grads, steps, states)
