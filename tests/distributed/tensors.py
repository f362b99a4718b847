"""DTensors of every kind for the tests, and their whole values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

_MESHES: dict[int, DeviceMesh] = {}


def mesh(ndim: int) -> DeviceMesh:
    """All processes in one dimension, or as replicas of shards, two by two."""
    if ndim not in _MESHES:
        world = dist.get_world_size()
        names = ("shards",) if ndim == 1 else ("replicas", "shards")
        _MESHES[ndim] = init_device_mesh(
            "cpu", (world,) if ndim == 1 else (2, world // 2), mesh_dim_names=names
        )
    return _MESHES[ndim]


def layouts() -> list[tuple[tuple[int, ...], tuple[DeviceMesh, Sequence[Any]] | None]]:
    """Shapes with meshes and placements; None for a plain tensor.

    On four processes they include even, uneven and empty shards and every mix of mesh dimensions.
    """
    return [
        ((8, 3), (mesh(1), [Shard(0)])),
        ((7, 300), (mesh(1), [Shard(0)])),
        ((2, 5), (mesh(1), [Shard(0)])),
        ((0,), (mesh(1), [Shard(0)])),
        ((3, 6), (mesh(1), [Shard(1)])),
        ((5,), (mesh(1), [Replicate()])),
        ((6, 2), (mesh(2), [Replicate(), Shard(0)])),
        ((1, 4), (mesh(2), [Replicate(), Shard(0)])),
        ((5, 4), (mesh(2), [Shard(0), Shard(1)])),
        ((9,), (mesh(2), [Shard(0), Shard(0)])),
        ((4,), (mesh(2), [Shard(0), Replicate()])),
        ((3, 3), None),
        ((), None),
    ]


def distributed(value: Tensor, how: tuple[DeviceMesh, Sequence[Any]] | None) -> Tensor:
    """A copy of a tensor that every process has, distributed."""
    value = value.detach().clone()
    return value if how is None else distribute_tensor(value, *how)


def parameters(
    values: Sequence[Tensor], hows: Sequence[tuple[DeviceMesh, Sequence[Any]] | None]
) -> list[torch.nn.Parameter]:
    """Parameters of such values."""
    return [
        torch.nn.Parameter(distributed(value, how)) for value, how in zip(values, hows, strict=True)
    ]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
