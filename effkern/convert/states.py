"""What is known of a value of the edited network, beside the same value of the original."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch.fx import Node

from effkern.convert.axes import Axis

__all__ = ["Lost", "MeanOf", "One", "Shift", "State", "sources"]


class Shift(NamedTuple):
    """It differs from the original by something that is constant along the feature axis.

    With ``centred`` it is exactly the original minus its mean along that axis. With ``scale``, a
    parameter of one entry for each feature, all this holds of scale * original.
    """

    axis: Axis
    features: int
    centred: bool
    scale: Node | None = None
    sources: int = 0  # the edits that it depends on, as bits


class One(NamedTuple):
    """It was ``scale``, the parameter, and is now one everywhere."""

    scale: Node
    sources: int


class MeanOf(NamedTuple):
    """It is the mean of ``value`` along the feature axis, which keeps its dimension."""

    value: Node
    axis: Axis
    sources: int


class Lost(NamedTuple):
    """Nothing is known of it since the operation ``node`` read something that was edited."""

    node: Node
    sources: int


#: None: it is the same as in the original.
State: TypeAlias = Shift | One | MeanOf | Lost | None


def sources(states: list[State]) -> int:
    """The edits that any of them depends on."""
    union = 0
    for state in states:
        if state is not None:
            union |= state.sources
    return union
