"""What an optimizer's steps keep between calls, and when it no longer holds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effkern.backends import choice
from effkern.optim.calls import ListedCall, PlannedCall
from effkern.optim.checks import check_grad, check_param, check_state
from effkern.optim.layout import share_memory
from effkern.optim.state import complete, create
from effkern.optim.watch import Watch

if TYPE_CHECKING:
    from effkern.optim.fused import FusedOptimizer

_grad = attrgetter("grad")


class Prepared:
    """The kernel calls of a step, as long as nobody moves or replaces a tensor.

    Made once, checked at every step, and made anew when a check of `accept` fails:

    ==============================================  ============================================
    what may have happened since                    what notices
    ==============================================  ============================================
    a group or a parameter added, removed, moved    the groups and their parameters, by identity
    amsgrad switched                                the names of each group's states
    another backend chosen                          the choice itself
    a parameter got its first gradient, or has      the gradients of the others are still None;
    none any more                                   the types of these are what they were
    state loaded, cleared, replaced, an entry       the values of ``optimizer.state`` and the
    of a parameter's state replaced                 entries in them, by identity
    ``.data =``, ``.to()``, ``share_memory_()``,    of states and steps: a `Watch`, which holds
    a storage resized                               them; of parameters, which ``Module.to`` may
                                                    swap only if nobody holds them: the call's
                                                    ``accept``
    a gradient of another dtype, device, layout     the call's ``accept``
    or shape
    ==============================================  ============================================

    Gradients are new at each step, so their addresses and strides are not part of this.

    It keeps no reference to its optimizer, whose memory a cycle would hold until the next
    garbage collection.

    Args:
        optimizer: whose parameters are checked first. Nothing is changed where one is refused;
            then states are made for those that have none.

    Raises:
        RuntimeError: if a parameter, gradient or state is refused, or no backend takes it.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        groups = optimizer.param_groups
        self._groups = list(groups)
        self._members = [list(group["params"]) for group in groups]
        self._names = [optimizer._state_names(group) for group in groups]
        self._choice = choice.requested()
        self._params: list[Tensor] = []
        self._idle: list[Tensor] = []
        of_group: list[list[Tensor]] = []
        for group, names in zip(groups, self._names, strict=True):
            of_group.append([])
            for param in group["params"]:
                if param.grad is None:
                    self._idle.append(param)
                    continue
                check_param(optimizer, group, param)
                check_grad(optimizer, group, param, param.grad)
                check_state(optimizer, group, param, names)
                of_group[-1].append(param)
            self._params += of_group[-1]
        backends = {kind: choice.serving(kind) for kind in {p.device.type for p in self._params}}

        # Nothing is refused from here on.
        self._holders = []
        entries: list[Tensor] = []
        self._calls: list[_Call] = []
        for group, names, params in zip(groups, self._names, of_group, strict=True):
            states = [optimizer.state[param] for param in params]
            new = [(s, p) for s, p in zip(states, params, strict=True) if not s]
            create([s for s, _ in new], [p for _, p in new], names)
            for param, state in zip(params, states, strict=True):
                complete(state, param, names)
            self._holders.append((itemgetter(*names, "step"), states))
            entries += [state[name] for state in states for name in (*names, "step")]
            first = sum(len(call.which) for call in self._calls)
            self._calls += _calls(optimizer, group, names, params, states, backends, first)

        self._grad_types = {type(param.grad) for param in self._params}
        self._states = list(optimizer.state.values())
        self._entries = entries
        self._watch = Watch(entries)
        written = [*self._params, *entries]
        # Tensors made in inference mode have no version counters,
        # and a view shares its base's.
        versioned = {id(t): t for t in map(_counted_by, written) if not t.is_inference()}
        self._versioned = list(versioned.values())

    def accept(self, optimizer: FusedOptimizer) -> list[list[Tensor]] | None:
        """Take the gradients of a step; nothing is updated yet.

        Args:
            optimizer: the one this was made for.

        Returns:
            What must be given to `run`; None where what was prepared no longer holds.
        """
        groups = optimizer.param_groups
        if (
            not _same(groups, self._groups)
            or not all(map(_same, map(itemgetter("params"), groups), self._members))
            or [optimizer._state_names(group) for group in groups] != self._names
            or choice.requested() != self._choice
        ):
            return None
        grads = list(map(_grad, self._params))
        if (
            set(map(type, grads)) != self._grad_types
            or any(param.grad is not None for param in self._idle)
            or not self._stands(optimizer)
        ):
            return None
        accepted = []
        for call in self._calls:
            part = grads if len(call.which) == len(grads) else [grads[i] for i in call.which]
            taken = call.kernel.accept(part)
            if taken is None:
                return None
            accepted.append(taken)
        return accepted

    def _stands(self, optimizer: FusedOptimizer) -> bool:
        """Whether every state is still there, where it was."""
        state = optimizer.state
        if not _same(state.values(), self._states):
            return False
        try:
            entries = chain.from_iterable(chain.from_iterable(map(g, h)) for g, h in self._holders)
            if not all(map(is_, entries, self._entries)):
                return False
        except KeyError:
            return False
        return not self._watch.moved()

    def run(self, optimizer: FusedOptimizer, accepted: list[list[Tensor]]) -> None:
        """Update every parameter.

        Args:
            optimizer: the one this was made for.
            accepted: what `accept` gave.
        """
        scalars = [
            {"lr": float(call.group["lr"]), **optimizer._scalars(call.group)}
            for call in self._calls
        ]
        # Before the kernels, which drive PyTorch's records of the tensors out of the caches.
        torch.autograd.graph.increment_version(self._versioned)
        for call, grads, arguments in zip(self._calls, accepted, scalars, strict=True):
            call.kernel.run(grads, arguments)


@dataclass
class _Call:
    """One kernel call, of what group it is, and which of all gradients it takes."""

    kernel: PlannedCall | ListedCall
    group: dict[str, Any]
    which: list[int]


def _calls(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    names: tuple[str, ...],
    params: list[Tensor],
    states: list[dict[str, Any]],
    backends: dict[str, str],
    first: int,
) -> list[_Call]:
    """The calls for one group, whose first gradient is number ``first`` of all."""
    by_kind: dict[Any, list[int]] = {}
    for i, (param, state) in enumerate(zip(params, states, strict=True)):
        kind = (param.device, param.dtype, state["step"].dtype)
        by_kind.setdefault(kind, []).append(i)
    calls = []
    for which in by_kind.values():
        backend = backends[params[which[0]].device.type]
        # Parameters that share memory, or are listed twice, are updated one after another.
        apart = backend != "reference" and share_memory(
            [params[i] for i in which]
            + [states[i][name] for i in which for name in (*names, "step")]
        )
        for part in [[i] for i in which] if apart else [which]:
            chosen = [params[i] for i in part]
            of_name = [[states[i][name] for i in part] for name in names]
            steps = [states[i]["step"] for i in part]
            kernel: PlannedCall | ListedCall
            if backend == "reference":
                with choice.use_backend(backend):
                    (op,) = optimizer._from_lists(chosen[0])
                kernel = ListedCall(op, chosen, optimizer._list_arguments(of_name), steps)
            else:
                (op,) = optimizer._from_plan(chosen[0])
                kernel = PlannedCall(op, chosen, of_name, steps, on_cpu=backend == "cpu")
            calls.append(_Call(kernel, group, [first + i for i in part]))
    return calls


def _counted_by(tensor: Tensor) -> Tensor:
    """The tensor whose version counter is this one's."""
    return tensor if tensor._base is None else tensor._base


def _same(now: Collection[Any], then: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(now) == len(then) and all(map(is_, now, then))
