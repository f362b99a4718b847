"""The norm of all gradients together, of which each process may have a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from effkern.ops.step import squares_from_lists
from effkern.optim.distributed import Sharding, total_over_shards


class Part(Protocol):
    """Gradients of one dtype and device, all sharded alike."""

    @property
    def device(self) -> torch.device:
        """Theirs."""

    @property
    def sharding(self) -> Sharding | None:
        """Theirs; None where this process has all of them."""

    def put_squares(self, squares: Tensor, place: int) -> None:
        """Put the sum of squares of what this process has into ``squares[place]``."""


@dataclass
class GradientList:
    """A `Part` as a list: one or more tensors of real numbers, each dense in memory."""

    device: torch.device
    sharding: Sharding | None
    grads: list[Tensor]

    def put_squares(self, squares: Tensor, place: int) -> None:
        """As `Part.put_squares`."""
        (kernel,) = squares_from_lists(self.grads[0])
        kernel(squares, place, self.grads)


def squares_of(parts: Sequence[Part]) -> Tensor:
    """Numbers that add up to the sum of squares of all gradients, of all shards.

    Args:
        parts: on every process the same shardings in the same order; perhaps none.

    Returns:
        float64, of one dimension, on the first part's device.
    """
    if not parts:
        return torch.zeros(1, dtype=torch.float64, device="cpu")
    together: dict[Any, list[Part]] = {}
    for part in parts:
        together.setdefault((part.device, part.sharding), []).append(part)
    sums = []
    for (device, sharding), some in together.items():
        of_parts = torch.empty(len(some), dtype=torch.float64, device=device)
        for place, part in enumerate(some):
            part.put_squares(of_parts, place)
        # How many parts there are depends on where tensors lie; not so how many sums.
        sums.append(of_parts if sharding is None else of_parts.sum(0, keepdim=True))
    sums = total_over_shards(sums, [sharding for _, sharding in together])
    if len(sums) == 1:
        return sums[0]
    return torch.cat([one.to(sums[0].device, non_blocking=True) for one in sums])


class LastNorm:
    """The norm at the last step that asked for one.

    An object of its own, since Dynamo drops what a graph assigns to an attribute of an optimizer.
    """

    _squares: Tensor | None = None
    _scale: Tensor | None = None

    def keep(self, squares: Tensor, scale: Tensor | None) -> None:
        """Remember numbers that add up to the sum of squares of gradients multiplied by scale."""
        self._squares = squares
        # A GradScaler changes its own in place.
        self._scale = None if scale is None else scale.clone()

    def value(self) -> Tensor | None:
        """The norm of the gradients without their scale, float64; None if there was no step."""
        if self._squares is None:
            return None
        norm = self._squares.sum().sqrt()
        return norm if self._scale is None else norm / self._scale
