"""How an operation passes on what is known of its operands: the one table that both walks read.

A rule is sound when, for operands as stated, its result holds for the operation's value. What no
rule covers is `Lost`: the search then leaves the edits alone that led there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Node

from effkern.convert.calls import is_zero, name_of, tensors_of
from effkern.convert.states import Lost, Shift, State, sources

__all__ = ["Given", "combine", "lost", "reads_shape_only", "rule", "shift_of", "transfer"]


class Given:
    """The states of a node's operands; those that are unchanged are left out of ``states``."""

    def __init__(self, states: dict[Node, State]) -> None:
        self.states = {node: state for node, state in states.items() if state is not None}

    def __call__(self, operand: Any) -> State:
        """The state of one operand; None for what is unchanged or no node."""
        return self.states.get(operand) if isinstance(operand, Node) else None


#: A rule gives the state of the value, or a list of states where the operation has several values.
Rule = Callable[[Node, Given], Any]

_RULES: dict[str, Rule] = {}

_SHAPE_ONLY = {
    "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like", "aten::rand_like",
    "aten::randn_like", "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty",
    "aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::_assert_tensor_metadata",
    "aten::size", "aten::_shape_as_tensor",
}  # fmt: skip


def reads_shape_only(node: Node) -> bool:
    """Whether an operation reads its operand's shape, dtype or device and none of its entries."""
    return name_of(node) in _SHAPE_ONLY


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of these operations."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in _RULES, name
            _RULES[name] = function
        return function

    return register


def lost(node: Node, given: Given) -> Lost:
    """What is known of a value once its operation read what was edited."""
    return Lost(node, sources(list(given.states.values())))


def shift_of(state: State) -> Shift | None:
    """The state where it is a shift."""
    return state if isinstance(state, Shift) else None


def combine(node: Node, given: Given, parts: Iterable[tuple[Any, State]]) -> State:
    """The state of a sum, or of rows of several values beside each other.

    Args:
        node: whose state it is.
        given: all its operands' states.
        parts: operands with their states, axes already those of the result.
    """
    parts = list(parts)
    shifts = [state for _, state in parts if isinstance(state, Shift)]
    if not shifts or len(shifts) < len(given.states):
        return lost(node, given) if given.states else None
    first = shifts[0]
    for other in shifts:
        if (other.axis, other.features, other.scale) != (first.axis, first.features, first.scale):
            return lost(node, given)
    centred = all(
        state.centred if isinstance(state, Shift) else is_zero(operand) for operand, state in parts
    )
    if first.scale is not None and not centred:
        return lost(node, given)
    return first._replace(centred=centred, sources=sources(list(shifts)))


def transfer(node: Node, states: dict[Node, State]) -> Any:
    """The state of a call's value; a list where it has several.

    Args:
        node: a ``call_function`` node.
        states: of its operands.
    """
    given = Given({operand: states[operand] for operand in tensors_of(node)})
    if not given.states:
        return None
    name = name_of(node)
    if name == "getitem":
        (state,) = given.states.values()
        return state[node.args[1]] if isinstance(state, list) else state
    if reads_shape_only(node):
        return None
    gone = [state for state in given.states.values() if isinstance(state, Lost)]
    if gone:
        return gone[0]._replace(sources=sources(list(gone)))
    known = _RULES.get(name)
    if known is None:
        return lost(node, given)
    try:
        return known(node, given)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError):
        return lost(node, given)  # an overload or a size that the rule does not foresee
