"""What an optimizer's steps keep between calls, and when it no longer holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effkern.backends import choice
from effkern.optim.calls import ListedCall, PlannedCall, Tensors
from effkern.optim.checks import check_grad, check_param, check_state
from effkern.optim.distributed import (
    Sharding,
    is_dtensor,
    local_gradient,
    local_tensor,
    sharding_of,
)
from effkern.optim.layout import share_memory
from effkern.optim.norm import squares_of
from effkern.optim.scaling import step_keywords
from effkern.optim.state import complete, create
from effkern.optim.storage import (
    MASTER,
    OPTIONS,
    Storage,
    codes_key,
    rounding_keys,
    scales_key,
    storage_of,
)
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
    amsgrad switched, another backend chosen, step  what `_asked` says
    counters wanted beside the parameters
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
    what a process has of a DTensor, a parameter    these local tensors, by identity; they are what
    or a state, exchanged inside it                 is watched and updated
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
        self._asked = _asked(optimizer)
        self._params: list[Tensor] = []
        self._idle: list[Tensor] = []
        of_group: list[list[Tensor]] = []
        for group in groups:
            of_group.append([])
            names = optimizer._states(group)
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
        #: The states that have certain keys.
        self._holders: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        private: list[Tensor] = []  # counters that stand in no state
        self._calls: list[_Call] = []
        for group, params in zip(groups, of_group, strict=True):
            names = optimizer._states(group)
            fresh = [param for param in params if not optimizer.state.get(param)]
            create(optimizer, group, fresh)
            completed = [complete(optimizer, group, param, names) for param in params]
            first_time = set(map(id, fresh))
            new = [
                made or id(param) in first_time
                for made, param in zip(completed, params, strict=True)
            ]
            steps = optimizer._counters(group, params, new)
            if not optimizer._has_step(group):
                private += steps
            kept = [name for name in names if name is not None]
            for param in params:
                keys = storage_of(group, param).keys(kept)
                if optimizer._has_step(group):
                    keys.append("step")
                if keys:
                    state = optimizer.state[param]
                    self._holders.setdefault(tuple(keys), []).append(state)
            first = sum(len(call.which) for call in self._calls)
            self._calls += _calls(optimizer, group, params, steps, backends, first)
        entries = list(self._current_entries())

        self._grad_types = {type(param.grad) for param in self._params}
        self._states = list(optimizer.state.values())
        self._entries = entries
        self._watch = Watch([*map(local_tensor, entries), *private])
        written = [*self._params, *entries]
        self._of_dtensors = [i for i, param in enumerate(self._params) if is_dtensor(param)]
        self._dtensors = [t for t in written if is_dtensor(t)]
        self._shards = list(map(local_tensor, self._dtensors))
        # Tensors made in inference mode have no version counters, and a view shares its base's.
        counted = map(_counted_by, [*written, *self._shards])
        versioned = {id(t): t for t in counted if not t.is_inference()}
        self._versioned = list(versioned.values())

    def accept(
        self, optimizer: FusedOptimizer, redistributed: dict[Tensor, Tensor]
    ) -> list[list[Tensor]] | None:
        """Take the gradients of a step; nothing is updated yet.

        Args:
            optimizer: the one this was made for.
            redistributed: as `local_gradient` takes it; empty when a step begins.

        Returns:
            What must be given to `run`; None where what was prepared no longer holds.
        """
        groups = optimizer.param_groups
        if (
            not _same(groups, self._groups)
            or not all(map(_same, map(itemgetter("params"), groups), self._members))
            or _asked(optimizer) != self._asked
        ):
            return None
        grads = list(map(_grad, self._params))
        if (
            set(map(type, grads)) != self._grad_types
            or any(param.grad is not None for param in self._idle)
            or not self._stands(optimizer)
        ):
            return None
        for i in self._of_dtensors:
            grads[i] = local_gradient(self._params[i], grads[i], redistributed)
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
            if not all(map(is_, self._current_entries(), self._entries)):
                return False
        except KeyError:
            return False
        return _same(list(map(local_tensor, self._dtensors)), self._shards) and (
            not self._watch.moved()
        )

    def prepare_for_graph(self) -> None:
        """Between `accept` and `run` while a CUDA graph is captured, which then needs this."""
        for call in self._calls:
            call.kernel.prepare_for_graph()

    def _current_entries(self) -> Iterable[Any]:
        return chain.from_iterable(_values(keys, of) for keys, of in self._holders.items())

    def run(self, optimizer: FusedOptimizer, accepted: list[list[Tensor]]) -> None:
        """Update every parameter.

        Args:
            optimizer: the one this was made for.
            accepted: what `accept` gave.
        """
        keywords = [step_keywords(optimizer, call.group, call.device) for call in self._calls]
        if optimizer.max_grad_norm is not None:
            squares = squares_of(self._calls)
            optimizer._keep_norm(squares)
            for call, arguments in zip(self._calls, keywords, strict=True):
                arguments["squares"] = squares.to(call.device, non_blocking=True)
                arguments["max_norm"] = float(optimizer.max_grad_norm)
        # Before the kernels, which drive PyTorch's records of the tensors out of the caches.
        torch.autograd.graph.increment_version(self._versioned)
        for call, grads, arguments in zip(self._calls, accepted, keywords, strict=True):
            call.kernel.run(grads, arguments)


@dataclass
class _Call:
    """One kernel call, where it is run, of what group it is, and which gradients it takes.

    All its parameters are sharded alike.
    """

    kernel: PlannedCall | ListedCall
    device: torch.device
    sharding: Sharding | None
    group: dict[str, Any]
    which: list[int]

    def put_squares(self, squares: Tensor, place: int) -> None:
        """As `effkern.optim.norm.Part.put_squares`."""
        self.kernel.squares(squares, place)


def _calls(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    params: list[Tensor],
    steps: list[Tensor],
    backends: dict[str, str],
    first: int,
) -> list[_Call]:
    """The calls for one group, whose first gradient is number ``first`` of all."""
    names = optimizer._states(group)
    by_kind: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        counter = (steps[i].dtype, steps[i].device) if steps else None
        kind = (param.device, param.dtype, counter, storage_of(group, param), sharding_of(param))
        by_kind.setdefault(kind, []).append(i)
    calls = []
    kernel: PlannedCall | ListedCall
    for (device, _, _, storage, sharding), which in by_kind.items():
        backend = backends[device.type]

        def tensors(part: list[int], storage: Storage = storage) -> Tensors:
            chosen = [params[i] for i in part]

            def of_state(key: str) -> list[Tensor]:
                return [local_tensor(optimizer.state[param][key]) for param in chosen]

            stored = codes_key if storage.quantized else str
            return Tensors(
                list(map(local_tensor, chosen)),
                [of_state(stored(name)) if name else [] for name in names],
                [of_state(scales_key(n)) if n and storage.quantized else [] for n in names],
                [steps[i] for i in part] if steps else [],
                of_state(MASTER) if storage.master else [],
                rounding_keys(optimizer, chosen) if storage.stochastic else [],
                storage,
            )

        whole = tensors(which)
        if sharding is not None and optimizer._sharded_call is not None:
            kernel = optimizer._sharded_call(optimizer._rule, whole, sharding)
            calls.append(_Call(kernel, device, sharding, group, [first + i for i in which]))
            continue
        # Parameters that share memory, or are listed twice, are updated one after another.
        written = [whole.params, *whole.states, *whole.scales, whole.steps, whole.masters]
        apart = backend != "reference" and share_memory([t for one in written for t in one])
        for part in [[i] for i in which] if apart else [which]:
            chosen = tensors(part) if apart else whole
            if backend == "reference":
                kernel = ListedCall(optimizer._rule, chosen)
            else:
                kernel = PlannedCall(optimizer._rule, chosen, on_cpu=backend == "cpu")
            calls.append(_Call(kernel, device, sharding, group, [first + i for i in part]))
    return calls


def _asked(optimizer: FusedOptimizer) -> tuple[Any, ...]:
    """What the calls depend on that is no tensor."""
    return (
        choice.requested(),
        [optimizer._states(group) for group in optimizer.param_groups],
        [[group.get(option) for option in OPTIONS] for group in optimizer.param_groups],
        [optimizer._counts_on_device(group) for group in optimizer.param_groups],
    )


def _values(keys: Sequence[str], states: list[dict[str, Any]]) -> Iterable[Any]:
    """The values at ``keys`` of each state, one state after another."""
    values = map(itemgetter(*keys), states)
    return values if len(keys) == 1 else chain.from_iterable(values)


def _counted_by(tensor: Tensor) -> Tensor:
    """The tensor whose version counter is this one's."""
    return tensor if tensor._base is None else tensor._base


def _same(now: Collection[Any], then: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(now) == len(then) and all(map(is_, now, then))
