"""Where the feature dimension of a value lies, and what an operation does to it.

A feature axis of d entries may be a whole dimension or a factor of one: dimension ``dim`` of size
``outer * d * inner``, with the feature index in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

__all__ = ["Axis", "candidates", "through_broadcast", "through_permutation", "through_view"]

#: Factors of a dimension that are tried as the part in front of the feature axis.
MOST_FACTORS = 64


class Axis(NamedTuple):
    """The feature axis of a tensor: inside dimension ``dim``, counted from the left."""

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def whole(self) -> bool:
        """Whether the dimension is the feature axis and nothing else."""
        return self.outer == 1 and self.inner == 1


def candidates(shape: Sequence[int], features: int) -> Iterator[Axis]:
    """Every axis of ``features`` entries that a tensor of this shape may have, the last first."""
    for dim in reversed(range(len(shape))):
        if isinstance(shape[dim], int) and shape[dim] and shape[dim] % features == 0:
            rest = shape[dim] // features
            for outer in range(1, min(rest, MOST_FACTORS) + 1):
                if rest % outer == 0:
                    yield Axis(dim, outer, rest // outer)


def through_view(axis: Axis, features: int, old: Sequence[int], new: Sequence[int]) -> Axis | None:
    """The axis after a view of another shape: the same elements in row-major order.

    None where the new shape cuts the axis in pieces.
    """
    after = len(old) - axis.dim
    if tuple(old[axis.dim :]) == tuple(new[-after:]):
        return axis._replace(dim=len(new) - after)
    if not all(isinstance(size, int) for size in (*old, *new)):
        return None  # sizes that depend on data
    step = axis.inner * prod(old[axis.dim + 1 :])  # between neighbours along the axis
    below = prod(new)
    for dim, size in enumerate(new):
        above, below = below, below // size if size else 0
        if below and step % below == 0 and above % (step * features) == 0:
            inner = step // below
            return Axis(dim, size // (features * inner), inner)
    return None


def through_permutation(axis: Axis, order: Sequence[int]) -> Axis:
    """The axis after ``permute(order)``."""
    dims = len(order)
    return axis._replace(dim=[dim % dims for dim in order].index(axis.dim))


def through_broadcast(axis: Axis, old: int, new: int) -> Axis:
    """The axis after broadcasting ``old`` dimensions to ``new``."""
    return axis._replace(dim=axis.dim + new - old)
