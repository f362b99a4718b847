"""A step inside torch.compile.

Dynamo traces what finds the tensors of a step, so that it guards on them and takes them as inputs
of the graph. What it cannot trace, or would take long to, runs beside the graph while it traces:
`begin_tracing`, `prepare_traced`. What only the kernels need to know is not traced at all but read
when the graph runs, so that a learning rate may change: `effkern.ops.deferred`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effkern.backends import choice
from effkern.optim.checks import check_param, check_state
from effkern.optim.distributed import is_dtensor
from effkern.optim.layout import as_real, is_dense, laid_out_like, share_memory
from effkern.optim.norm import GradientList, squares_of
from effkern.optim.scaling import tensor_keywords
from effkern.optim.state import complete, own_memory
from effkern.optim.storage import MASTER, codes_key, scales_key, storage_of

if TYPE_CHECKING:
    from effkern.optim.fused import FusedOptimizer

#: Whether inductor copies tensors that do not begin with their storage (`own_memory`).
_OFFSETS_ARE_SAFE = torch.__version__ >= "2.13"

_deferred_step_ = torch.ops.effkern._deferred_step_.default


def step_traced(optimizer: FusedOptimizer) -> None:
    """Update every parameter that has a gradient; none is a DTensor.

    Of fake tensors this is the eager step too.
    """
    groups = optimizer._groups
    for group in groups:
        for param in group["params"]:
            id(param)  # Dynamo then guards on it: it is what states are found by
    which = [
        tuple([i for i, param in enumerate(group["params"]) if param.grad is not None])
        for group in groups
    ]
    if torch.compiler.is_dynamo_compiling() and optimizer._is_changed_by_graph():
        torch._dynamo.graph_break(msg="the graph changes a parameter group before the step")
        return
    apart, lr_tensors, unsafe = optimizer._prepare_traced(tuple(which))
    calls = [
        call
        for number in range(len(groups))
        for call in _calls(optimizer, number, which[number], apart[number], unsafe[number])
    ]
    squares = None
    if optimizer.max_grad_norm is not None:
        squares = squares_of([GradientList(call.device, None, call.grads) for call in calls])
        optimizer._keep_norm(squares)
    backend = choice.requested() or ""
    for call in calls:
        lr = groups[call.number]["lr"] if lr_tensors[call.number] else None
        tensors = tensor_keywords(optimizer, lr, call.device)
        if squares is not None:
            tensors["squares"] = squares.to(call.device, non_blocking=True)
        _deferred_step_(optimizer._name, call.number, call.which, backend, *call.lists(), **tensors)
        for tensor, updated in call.copied:
            tensor.copy_(torch.view_as_complex(updated) if tensor.is_complex() else updated)


def begin_tracing(optimizer: FusedOptimizer) -> bool:
    """Before Dynamo sees a tensor of the step, and beside the graph: check the gradients there are.

    Dynamo refuses sparse ones in other words.

    Returns:
        Whether a graph can hold the step: not where parameters are DTensors.

    Raises:
        RuntimeError: if a gradient is refused.
    """
    optimizer._opt_called = True  # what a graph sets on an optimizer, Dynamo drops
    if any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"]):
        return False
    optimizer._check_grads()
    return True


def is_changed_by_graph(optimizer: FusedOptimizer) -> bool:
    """Whether the graph that is being traced has, before this, changed groups or states.

    Dynamo makes such changes when the graph has run. Asked while it traces.

    Raises:
        RuntimeError: if the graph has changed ``max_grad_norm``, which Dynamo would forget.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    effects = InstructionTranslator.current_tx().output.side_effects
    for variable, attributes in effects.store_attr_mutations.items():
        if getattr(variable, "value", None) is optimizer and "max_grad_norm" in attributes:
            raise RuntimeError("max_grad_norm cannot be changed inside a compiled function")
    groups = optimizer.param_groups
    params = [group["params"] for group in groups]
    read = [groups, *groups, *params, optimizer.state, *optimizer.state.values()]
    variables = [effects.id_to_variable.get(id(one)) for one in read]
    return any(one is not None and effects.is_modified(one) for one in variables)


def prepare_traced(
    optimizer: FusedOptimizer, which: tuple[tuple[int, ...], ...]
) -> tuple[tuple[bool, ...], tuple[bool, ...], tuple[tuple[int, ...], ...]]:
    """While a step is traced, and beside the graph: check its tensors, and make what is missing.

    Args:
        optimizer: whose states are made.
        which: for each group the places of the parameters that have a gradient.

    Returns:
        For each group whether its parameters or states share memory, and are updated one after
        another, whether its learning rate is in a tensor (Dynamo would guard on a float before it
        answered), and the places of parameters that inductor would not find.

    Raises:
        RuntimeError: if a parameter or state is refused; nothing was changed.
    """
    chosen = [
        (group, [group["params"][i] for i in some])
        for group, some in zip(optimizer.param_groups, which, strict=True)
    ]
    for group, params in chosen:
        for param in params:
            check_param(optimizer, group, param)
            check_state(optimizer, group, param, optimizer._states(group))
    apart = []
    for group, params in chosen:
        names = optimizer._states(group)
        new = [complete(optimizer, group, param, names) for param in params]
        optimizer._counters(group, params, new)
        for param in params:
            own_memory(optimizer.state.get(param, {}))
        values = [v for p in params for v in optimizer.state.get(p, {}).values()]
        tensors = [*params, *(v for v in values if isinstance(v, Tensor))]
        fake = any(isinstance(t, FakeTensor) for t in tensors)
        apart.append(not fake and share_memory(tensors))
    lr_tensors = [isinstance(group["lr"], Tensor) for group, _ in chosen]
    unsafe = [
        tuple(i for i in some if not _OFFSETS_ARE_SAFE and group["params"][i].storage_offset())
        for group, some in zip(optimizer.param_groups, which, strict=True)
    ]
    return tuple(apart), tuple(lr_tensors), tuple(unsafe)


@dataclass
class _Call:
    """Parameters of one group, dtype and device, stored alike, and all that goes with them.

    Attributes:
        number: of the group.
        which: the parameters' places in it.
        device: theirs.
        params: real and dense, copies where they themselves are not.
        grads: real, laid out like them.
        states: real, of all lists that are kept, one after another.
        steps: or none, as are the next two.
        masters: float32.
        scales: of states in 8 bits.
        copied: parameters and states with the copies that are updated in their place.
    """

    number: int
    which: list[int]
    device: torch.device
    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]
    scales: list[Tensor]
    copied: list[tuple[Tensor, Tensor]]

    def lists(self) -> list[list[Tensor]]:
        """What the op takes."""
        return [self.params, self.grads, self.states, self.steps, self.masters, self.scales]


def _calls(
    optimizer: FusedOptimizer,
    number: int,
    which: tuple[int, ...],
    apart: bool,
    unsafe: tuple[int, ...],
) -> Iterator[_Call]:
    """The calls for one group, in the order of an eager step; of its ``unsafe`` parameters copies
    are updated.
    """
    group = optimizer._groups[number]
    params: list[Tensor] = group["params"]
    names = [name for name in optimizer._states(group) if name is not None]
    in_state = optimizer._has_step(group)
    counted = in_state or optimizer._needs_steps(group)
    by_kind: dict[Any, list[int]] = {}
    steps: dict[int, Tensor] = {}
    for i in which:
        kind: tuple[Any, ...] = (params[i].device, params[i].dtype)
        if counted:
            state = optimizer.state[params[i]] if in_state else None
            steps[i] = optimizer._steps[params[i]] if state is None else state["step"]
            kind = (*kind, steps[i].dtype, steps[i].device)
        by_kind.setdefault(kind, []).append(i)
    for alike in by_kind.values():
        for some in [[i] for i in alike] if apart else [alike]:
            storage = storage_of(group, params[some[0]])
            stored = [codes_key(name) if storage.quantized else name for name in names]
            scaled = [scales_key(name) for name in names] if storage.quantized else []
            chosen = [params[i] for i in some]
            dense = [
                p if is_dense(p) and i not in unsafe else torch.empty_like(p).copy_(p)
                for i, p in zip(some, chosen, strict=True)
            ]
            grads = [
                laid_out_like(p.grad, d)  # type: ignore[arg-type]
                for p, d in zip(chosen, dense, strict=True)
            ]
            states = [optimizer.state[p][key] for key in stored for p in chosen]
            # A graph would not write to real views of its inputs, but to memory beyond them.
            own = [
                torch.view_as_real(t).clone() if t.is_complex() else t for t in [*dense, *states]
            ]
            yield _Call(
                number=number,
                which=some,
                device=chosen[0].device,
                params=own[: len(some)],
                grads=[as_real(grad) for grad in grads],
                states=own[len(some) :],
                steps=[steps[i] for i in some] if counted else [],
                masters=[optimizer.state[p][MASTER] for p in chosen] if storage.master else [],
                scales=[optimizer.state[p][key] for key in scaled for p in chosen],
                copied=[
                    (t, copy)
                    for t, copy in zip([*chosen, *states], own, strict=True)
                    if copy is not t
                ],
            )
