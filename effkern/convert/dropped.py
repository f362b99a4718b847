"""What operations do to values that were centred and then lost their last feature.

Such a value is the original minus its mean along the feature axis, with zero in place of the last
feature. The table of rules says which operations keep a centred row centred; those that treat all
features alike keep the zero in its place too. What only does not see a shift, such as a mean or a
softmax over the features, does see a missing feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from effkern.convert.calls import arguments, name_of, shape_of, tensors_of
from effkern.convert.rules import reads_shape_only, transfer
from effkern.convert.states import Lost, One, Shift, State, sources

__all__ = ["transfer_dropped"]


def transfer_dropped(node: Node, states: dict[Node, Any]) -> Any:
    """The state of a call's value, where `Shift` operands have lost their last feature.

    Args:
        node: a ``call_function`` node.
        states: of its operands.

    Returns:
        A centred `Shift` for a value that has lost its last feature, as `transfer` otherwise.
    """
    result = transfer(node, states)
    if isinstance(result, list):
        return [_kept(node, part, states) for part in result]
    return _kept(node, result, states)


def _kept(node: Node, state: State, states: dict[Node, Any]) -> State:
    """A state that the rules give, where it holds of what has lost a feature."""
    if isinstance(state, Lost | One):
        return state
    if isinstance(state, Shift) and state.centred and not _moves_features(node, state):
        return state
    read = [part for x in tensors_of(node) for part in _parts(states[x]) if part is not None]
    if not read or (state is None and reads_shape_only(node)):
        return None
    return _lost(node, read)


def _parts(state: Any) -> list[State]:
    return state if isinstance(state, list) else [state]


def _lost(node: Node, read: Sequence[State]) -> Lost:
    return Lost(node, sources(list(read)))


def _moves_features(node: Node, state: Shift) -> bool:
    """Whether features change places, which a centred row does not mind."""
    if name_of(node) != "aten::roll":
        return False
    dims = len(shape_of(node))
    return state.axis.dim in {dim % dims for dim in arguments(node)["dims"]}
