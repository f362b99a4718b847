"""The backward walk: what must be centred for a layer norm to read a row of zero mean.

A demand says that a value be centred along an axis. Which operands that asks for is found by
trying them on the transfer rules, so that backward and forward cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.fx import Node

from effkern.convert.axes import Axis, candidates
from effkern.convert.calls import arguments, is_floating, is_zero, name_of, shape_of
from effkern.convert.norms import Norm
from effkern.convert.rules import transfer
from effkern.convert.states import One, Shift, State
from effkern.convert.trace import Trace, is_mark

__all__ = ["Demand", "Demands", "Key"]


class Key(NamedTuple):
    """A value that is to be centred; after a multiplication by ``scale`` where there is one."""

    node: Node
    axis: Axis
    features: int
    scale: Node | None = None


@dataclass
class Demand:
    """What a key asks for: the demands that together meet it, an edit, or why it cannot be met."""

    children: list[Key] = field(default_factory=list)
    ones: Node | None = None  # a scale that is folded where this is met
    edit: bool = False
    failure: str | None = None


class Demands:
    """The demands of all norms of a trace, each worked out once."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._known: dict[Key, Demand] = {}

    def __getitem__(self, key: Key) -> Demand:
        if key not in self._known:
            self._known[key] = self._expand(key)
        return self._known[key]

    def of(self, norm: Norm) -> Key:
        """The demand of a norm."""
        return Key(norm.value, norm.axis, norm.features)

    def below(self, roots: list[Key], stop: set[Key]) -> list[Key]:
        """All demands that these lead to, in the order of the graph; not past those in ``stop``."""
        found = set(roots)
        pending = list(roots)
        while pending:
            key = pending.pop()
            if key in stop:
                continue
            for child in self[key].children:
                if child not in found:
                    found.add(child)
                    pending.append(child)
        return sorted(found, key=lambda key: self.trace.position[key.node])

    def _expand(self, key: Key) -> Demand:
        node = key.node
        if is_zero(node):
            return Demand()
        if node.op == "placeholder":
            if node in self.trace.parameters:
                return Demand(edit=True)
            return Demand(failure=f"it begins with {self.trace.fixed[node]}")
        if node.op != "call_function":
            return Demand(failure=f"it begins with {node.op} {node.target}")
        return self._plain(key) or self._folded(key) or Demand(failure=self._why(key))

    def _why(self, key: Key) -> str:
        name = name_of(key.node).removeprefix("aten::")
        where = self.trace.module(key.node)
        return f"what {name} in {where or 'the model'} gives cannot be centred by editing weights"

    def _plain(self, key: Key) -> Demand | None:
        """The operands that, centred, make the value centred."""
        operands = self._operands(key.node)
        if is_mark(key.node):
            return Demand(children=[key._replace(node=operands[0])])
        chosen: dict[Node, Shift] = {}
        for operand in operands:
            if not is_floating(operand):
                continue
            for axis in candidates(shape_of(operand), key.features):
                trial = Shift(axis, key.features, True, key.scale)
                result = self._result(key.node, {operand: trial})
                if isinstance(result, Shift) and (result.axis, result.scale) == (
                    key.axis,
                    key.scale,
                ):
                    chosen[operand] = trial
                    break
        if key.scale is not None and not chosen:
            # linear and its bias are folded together or not at all: try them jointly
            chosen = self._jointly(key, operands)
        if not chosen or not self._meets(key, dict(chosen)):
            together = self._jointly(key, operands)
            if not together or not self._meets(key, dict(together)):
                return None
            chosen = together
        return Demand(
            children=[key._replace(node=node, axis=shift.axis) for node, shift in chosen.items()]
        )

    def _jointly(self, key: Key, operands: list[Node]) -> dict[Node, Shift]:
        """Operands whose unscaled, centred selves fit the demand, with the demand's scale."""
        chosen: dict[Node, Shift] = {}
        for operand in operands:
            if not is_floating(operand):
                continue
            for axis in candidates(shape_of(operand), key.features):
                result = self._result(key.node, {operand: Shift(axis, key.features, True)})
                if isinstance(result, Shift) and result.axis == key.axis:
                    chosen[operand] = Shift(axis, key.features, True, key.scale)
                    break
        return chosen

    def _folded(self, key: Key) -> Demand | None:
        """A product with a LayerScale, which is folded into what it scales."""
        if name_of(key.node) not in ("aten::mul", "aten::multiply") or key.scale is not None:
            return None
        bound = arguments(key.node)
        pairs = ((bound["self"], bound["other"]), (bound["other"], bound["self"]))
        for value, factor in pairs:
            scale = self._parameter(factor, key.features)
            if scale is None or not isinstance(value, Node):
                continue
            for axis in candidates(shape_of(value), key.features):
                states: dict[Node, State] = {
                    value: Shift(axis, key.features, True, scale),
                    factor: One(scale, 0),
                }
                if self._meets(key, states):
                    child = key._replace(node=value, axis=axis, scale=scale)
                    return Demand(children=[child], ones=scale)
        return None

    def _parameter(self, node: Any, features: int) -> Node | None:
        """The parameter of one entry for each feature that a value is a view of."""
        while isinstance(node, Node) and node.op == "call_function":
            trial = transfer(node, {x: One(x, 0) for x in node.all_input_nodes})
            if not isinstance(trial, One) or len(node.all_input_nodes) != 1:
                return None
            node = node.all_input_nodes[0]
        if not isinstance(node, Node) or node not in self.trace.parameters:
            return None
        shape = shape_of(node)
        return node if max(shape, default=0) == features == _numel(shape) else None

    @staticmethod
    def _operands(node: Node) -> list[Node]:
        if name_of(node) == "getitem":
            return list(node.args[0].all_input_nodes)  # type: ignore[union-attr]
        return list(node.all_input_nodes)

    def _result(self, node: Node, states: dict[Node, State]) -> State:
        """The state of a value whose operands are in these states, and otherwise unchanged."""
        if name_of(node) == "getitem":
            several = node.args[0]
            assert isinstance(several, Node)
            result = self._result(several, states)
            return result[node.args[1]] if isinstance(result, list) else result
        return transfer(node, {x: states.get(x) for x in node.all_input_nodes})

    def _meets(self, key: Key, states: dict[Node, State]) -> bool:
        result = self._result(key.node, states)
        return (
            isinstance(result, Shift)
            and result.centred
            and (result.axis, result.scale) == (key.axis, key.scale)
        )


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
