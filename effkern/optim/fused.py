"""The base of every fused optimizer: its state, and the step that every update rule shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import Optimizer

from effkern.ops.deferred import register
from effkern.ops.step import RuleOps
from effkern.optim.calls import ListedCall
from effkern.optim.checks import check_grad, check_state
from effkern.optim.norm import LastNorm
from effkern.optim.prepared import Prepared
from effkern.optim.scaling import deferred_keywords
from effkern.optim.state import counter_device, export, keep_dtypes, step_counter
from effkern.optim.storage import asked_options, rounding_keys, storage_of
from effkern.optim.traced import (
    begin_tracing,
    is_changed_by_graph,
    prepare_traced,
    step_traced,
)


class FusedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that updates all parameters of a group in one kernel call.

    One call for each dtype and device, to be exact. A subclass is one update rule: it names the
    kernel ops and says which state tensors a group keeps and which options its step takes.

    Of parameters that are DTensors each process updates what it has; states are DTensors of the
    same mesh and placements. States in 8 bits are plain tensors of the process, cut in blocks
    within its shard, and float32 DTensors in a state_dict, which therefore loads on any number of
    processes (but not as a flattened one of `torch.distributed.checkpoint`). LAMB's norms and
    ``max_grad_norm`` are over all shards, which takes a collective in each step.

    torch.compile takes a step into its graph, whatever the options, and reads hyperparameters when
    the graph runs: one that changes does not compile anew. A step of DTensors runs beside the
    graph, which ``fullgraph=True`` refuses.
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
        self._last_norm = LastNorm()
        if not hasattr(self, "_name"):
            self._name = register(self)  # in compiled graphs, also after a state was loaded

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
            device, counter = counter_device(self, group, param), self._steps.get(param)
            if begins or counter is None:
                self._steps[param] = step_counter(0.0 if begins else 1.0, device)
            elif counter.device != device:
                self._steps[param] = counter.to(device)
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
        norm = self._last_norm.value()
        if norm is None:
            raise AttributeError("last_grad_norm is there after a step with max_grad_norm")
        params = (p for group in self.param_groups for p in group["params"])
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
        return norm if wide else norm.float()

    def _keep_norm(self, squares: Tensor) -> None:
        self._last_norm.keep(squares, self._scaling()[0])

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
        elif self._begin_tracing():
            step_traced(self)
        else:
            self._step_outside()
        return loss

    # torch's schedulers notice steps by wrapping this method, in what Dynamo does not trace. With
    # this they leave it alone, and look for `_opt_called`.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _counts_on_device(self, group: dict[str, Any]) -> bool:
        """Whether step counters stand beside the parameters rather than on the host."""
        return bool(group.get("capturable")) or self._scaling() != (None, None)

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients' scale, and whether one of them is infinite, while a GradScaler steps."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _step_eagerly(self) -> None:
        self._opt_called = True
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
                step_traced(self)
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

    # Beside a graph, which cannot hold a step of DTensors.
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

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """``param_groups`` under another name: by that one Dynamo guards on every number in it."""
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        return groups

    def _begin_tracing(self) -> bool:
        return begin_tracing(self)

    def _is_changed_by_graph(self) -> bool:
        return is_changed_by_graph(self)

    def _prepare_traced(
        self, which: tuple[tuple[int, ...], ...]
    ) -> tuple[tuple[bool, ...], tuple[bool, ...], tuple[tuple[int, ...], ...]]:
        return prepare_traced(self, which)

    # Dynamo calls these while it traces, beside the graph. `torch.compiler.assume_constant_result`
    # does the same, but loads Dynamo.
    _begin_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
    _is_changed_by_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]
    _prepare_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _deferred(
        self, group: int, which: Sequence[int], tensors: dict[str, Tensor | None]
    ) -> tuple[list[bool], list[int], dict[str, Any]]:
        """As `effkern.ops.deferred.Stepper._deferred`."""
        asked = self.param_groups[group]
        params = [asked["params"][i] for i in which]
        stochastic = storage_of(asked, params[0]).stochastic
        return (
            [name is not None for name in self._states(asked)],
            rounding_keys(self, params) if stochastic else [],
            deferred_keywords(self, asked, tensors),
        )
