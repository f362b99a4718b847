"""The base of every fused optimizer: its state, and the step that every update rule shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import Optimizer

from effkern.ops.step import RuleOps
from effkern.optim.calls import ListedCall
from effkern.optim.checks import check_grad, check_param, check_state
from effkern.optim.distributed import is_dtensor
from effkern.optim.prepared import Prepared
from effkern.optim.state import complete, export, keep_dtypes, step_counter
from effkern.optim.storage import OPTIONS, asked_options
from effkern.optim.traced import step_lists


class FusedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that updates all parameters of a group in one kernel call.

    One call for each dtype and device, to be exact. A subclass is one update rule: it names the
    kernel ops and says which state tensors a group keeps and which options its step takes.

    Of parameters that are DTensors each process updates what it has; states are DTensors of the
    same mesh and placements. States in 8 bits are plain tensors of the process, cut in blocks
    within its shard, and float32 DTensors in a state_dict, which therefore loads on any number of
    processes (but not as a flattened one of `torch.distributed.checkpoint`). LAMB's norms and
    ``max_grad_norm`` are over all shards, which takes a collective in each step.

    torch.compile takes a step into its graph; it runs beside the graph for DTensors, for complex
    parameters, and with ``master_weights``, ``state_dtype``, ``stochastic_rounding`` or
    ``max_grad_norm``.
    """

    _rule: ClassVar[RuleOps]

    #: Whether torch's class keeps the number of steps in a parameter's state.
    _keeps_step: ClassVar[bool] = True

    #: What updates sharded parameters, where an element's update depends on all of its tensor: made
    #: of the rule, the tensors and their `effkern.optim.distributed.Sharding`.
    _sharded_call: ClassVar[Callable[..., ListedCall] | None] = None

    # Set by torch.amp.GradScaler for the time of a step.
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        master_weights: bool,
        state_dtype: torch.dtype | str | None,
        stochastic_rounding: bool,
        max_grad_norm: float | None,
    ) -> None:
        if defaults["differentiable"]:
            raise RuntimeError(
                f"{type(self).__name__} does not support differentiable=True: its step runs in "
                "fused kernels"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        defaults.update(asked_options(master_weights, state_dtype, stochastic_rounding))
        self._forget()
        #: To what norm a step clips the gradients of all groups together; None: it does not.
        self.max_grad_norm = max_grad_norm
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Begin without what is kept between steps but not in ``state``."""
        self._prepared: Prepared | None = None
        self._rounding_seed: int | None = None
        self._steps: dict[Tensor, Tensor] = {}
        self._captured: list[Prepared] = []
        self._last_norm: tuple[Tensor, Tensor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: clipping too, which stands in no group."""
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self.max_grad_norm = getattr(self, "max_grad_norm", None)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            steps = group.pop("step", None)  # Apex counts once for the group
            for param in group["params"]:
                of_param = self.state.get(param)
                if not of_param:
                    continue
                if steps is not None:
                    of_param.setdefault("step", steps)
                # PyTorch before 1.12 kept step as a number, and so does Apex.
                if isinstance(of_param.get("step"), (int, float)):
                    of_param["step"] = step_counter(of_param["step"])

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, which `torch.distributed.checkpoint` can save.

        States of DTensors that are stored in 8 bits stand there as float32 DTensors, without codes
        and scales of their own.
        """
        # Before the hooks that see, and may replace, what is returned.
        hook = self.register_state_dict_post_hook(
            lambda _, state_dict: export(self, state_dict), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, of the class of torch.optim it stands for, or of Apex.

        Masters, and states that the options would have in another dtype than the parameter's, keep
        the dtype they were saved in; the next step brings them to the one asked for.

        Raises:
            ValueError: if the groups are not of the same numbers of parameters.
            RuntimeError: if a state does not fit its parameter, which it names. Nothing was loaded
                then.
        """
        before = dict(self.__dict__)
        given: dict[str, Any] = {}

        def note(_: Optimizer, adapted: dict[str, Any]) -> None:
            given.update(adapted)

        # Behind the hooks that may put another in the place of what was passed, and before those
        # that see what was loaded.
        hooks = (
            self.register_load_state_dict_pre_hook(note),
            self.register_load_state_dict_post_hook(
                lambda _: keep_dtypes(self, given), prepend=True
            ),
        )
        try:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                for param in group["params"]:
                    check_state(self, group, param, self._states(group))
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            for hook in hooks:
                hook.remove()

    # ---- what a rule says of itself ----

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """For each list of states that the kernel takes, their key in a parameter's state.

        None for a list that the group's options leave empty.
        """
        raise NotImplementedError

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the kernel that are the rule's own."""
        raise NotImplementedError

    def _is_signed(self, group: dict[str, Any], name: str) -> bool:
        """Whether the values of state ``name`` may be negative."""
        return self._rule.signed[self._states(group).index(name)]

    def _initial(self, group: dict[str, Any]) -> float:
        """What a new state is filled with."""
        return 0.0

    def _counters(
        self, group: dict[str, Any], params: Sequence[Tensor], new: Sequence[bool]
    ) -> list[Tensor]:
        """The step counters of parameters whose states are made; empty where none is needed.

        Args:
            group: theirs.
            params: the parameters.
            new: for each, whether its states were made just now.
        """
        if self._has_step(group):
            return [self.state[param]["step"] for param in params]
        if not self._needs_steps(group):
            return []
        for param, begins in zip(params, new, strict=True):
            if begins or param not in self._steps:
                self._steps[param] = step_counter(0.0 if begins else 1.0)
        return [self._steps[param] for param in params]

    def _has_step(self, group: dict[str, Any]) -> bool:
        """Whether a parameter's state holds the number of its steps."""
        return self._keeps_step or bool(group.get("stochastic_rounding"))

    def _needs_steps(self, group: dict[str, Any]) -> bool:
        """Whether the kernel must know the number of the step though no state holds it."""
        return False

    def _saved(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """What checkpoints and copies take of the state of ``param``."""
        return state

    def _steps_taken(self, state: dict[str, Any]) -> float:
        """What a step counter begins with that is missing in a state that is there."""
        return 0.0

    # ---- clipping ----

    @property
    def last_grad_norm(self) -> Tensor:
        """The norm of all gradients at the last step, before it clipped them to ``max_grad_norm``.

        0-dim, float32, float64 with float64 parameters.

        Raises:
            AttributeError: if there was no such step.
        """
        if self._last_norm is None:
            raise AttributeError("last_grad_norm is there after a step with max_grad_norm")
        squares, scale = self._last_norm
        norm = squares.sum().sqrt()
        if scale is not None:
            norm = norm / scale
        params = (p for group in self.param_groups for p in group["params"])
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
        return norm if wide else norm.float()

    def _keep_norm(self, squares: Tensor) -> None:
        self._last_norm = (squares, self._scaling()[0])

    # ---- the step ----

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
        if not torch.compiler.is_compiling():
            self._step_eagerly()
        elif not self._is_traceable():
            self._step_outside()
        else:
            for group in self.param_groups:
                self._step_traced(group)
        return loss

    def _counts_on_device(self, group: dict[str, Any]) -> bool:
        """Whether step counters stand beside the parameters rather than on the host."""
        return bool(group.get("capturable")) or self._scaling() != (None, None)

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients' scale, and whether one of them is infinite, while a GradScaler steps."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _step_eagerly(self) -> None:
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capturing:
            self._check_capturable()
        prepared = self._prepared
        redistributed: dict[Tensor, Tensor] = {}
        accepted = None if prepared is None else self._accept(prepared, redistributed)
        if prepared is None or accepted is None:
            params = (p for group in self.param_groups for p in group["params"])
            if any(isinstance(p, FakeTensor) for p in params):
                # Nothing is computed: what estimates memory sees states and kernel calls.
                for group in self.param_groups:
                    self._step_traced(group)
                return
            # What the old one keeps of tensors goes before new ones are made.
            prepared = self._prepared = None
            prepared = self._prepared = Prepared(self)
            accepted = self._accept(prepared, redistributed)
            if accepted is None:
                raise RuntimeError(f"{type(self).__name__}: a tensor was moved while the step ran")
        if capturing:
            prepared.prepare_for_graph()
            self._captured.append(prepared)  # the graph reads its tables at each replay
            self._prepared = None
        prepared.run(self, accepted)

    def _is_traceable(self) -> bool:
        """Whether a compiled graph can hold the step."""
        params = (p for group in self.param_groups for p in group["params"])
        return (
            self.max_grad_norm is None
            and not any(group.get(option) for group in self.param_groups for option in OPTIONS)
            and not any(p.is_complex() or is_dtensor(p) for p in params)
        )

    # Where torch.compile cannot hold the step in its graph.
    _step_outside = torch._disable_dynamo(_step_eagerly)

    def _accept(
        self, prepared: Prepared, redistributed: dict[Tensor, Tensor]
    ) -> list[list[Tensor]] | None:
        try:
            return prepared.accept(self, redistributed)
        except RuntimeError:
            self._check_grads()  # names the gradient, if that is what was refused
            raise

    def _check_grads(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    check_grad(self, group, param, param.grad)

    def _check_capturable(self) -> None:
        if not all(group.get("capturable") for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__} can step while a CUDA graph is captured only with "
                "capturable=True: without it step counters are on the host"
            )

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
        names = self._states(group)
        chosen = [param for param in group["params"] if param.grad is not None]
        for param in chosen:
            check_param(self, group, param)
            check_grad(self, group, param, param.grad)
            check_state(self, group, param, names)
        new = [complete(self, group, param, names) for param in chosen]
        params += chosen
        grads += [param.grad for param in chosen]
        steps += self._counters(group, chosen, new)
        for name, tensors in zip(names, states, strict=True):
            if name is not None:
                tensors += [self.state[param][name] for param in chosen]

    # Under another name Dynamo traces it like any method: slower to compile, but it may then
    # follow a backward in the same graph.
    _init_group_in_graph = _init_group

    def _step_traced(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        steps: list[Tensor] = []
        states: list[list[Tensor]] = [[] for _ in self._states(group)]
        if getattr(torch._dynamo.config, "trace_autograd_ops", False):
            self._init_group_in_graph(group, params, grads, steps, *states)
        else:
            self._init_group(group, params, grads, steps, *states)
        step_lists(self, group, params, grads, steps, states)
