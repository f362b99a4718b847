"""Parameters that are DTensors: the kernels update the tensors that each process has of them.

Everything here holds on every process alike, so that all of them call the same collectives in the
same order, also where a process has no element of a parameter.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

#: The types that certainly are no DTensors.
PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Sharding:
    """Along which dimensions of a mesh of processes a tensor is cut.

    Attributes:
        mesh: the processes.
        dims: of the mesh; along its others the tensor is replicated.
    """

    mesh: DeviceMesh
    dims: tuple[int, ...]


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a `torch.distributed.tensor.DTensor`."""
    if type(tensor) in PLAIN:
        return False
    # Whoever has one has imported its module; nobody else shall wait for that.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor; another tensor itself.

    Unlike ``to_local`` it is the tensor that the DTensor holds, neither a view nor differentiable.
    """
    if not is_dtensor(tensor):
        return tensor
    local = tensor._local_tensor
    # The result of a collective that may still be under way.
    return local if type(local) in PLAIN or not hasattr(local, "wait") else local.wait()


def wrapped_like(local: Tensor, param: Tensor) -> Tensor:
    """``local`` as a DTensor of the mesh, placements and shape of ``param``; plain if that is.

    Args:
        local: of the shape of what this process has of ``param``, of any dtype.
        param: a DTensor or not.
    """
    if not is_dtensor(param):
        return local
    # `DTensor.from_local` would move an offloaded tensor to the mesh's kind of device.
    spec: Any = copy.copy(param._spec)
    spec.tensor_meta = spec.tensor_meta._replace(dtype=local.dtype)
    made: Tensor = sys.modules["torch.distributed.tensor"].DTensor(local, spec, requires_grad=False)
    return made


def replicated(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, as a DTensor of the mesh of ``like``, which is one."""
    module = sys.modules["torch.distributed.tensor"]
    mesh = like.device_mesh  # type: ignore[attr-defined]
    made: Tensor = module.DTensor.from_local(
        value, mesh, [module.Replicate()] * mesh.ndim, run_check=False
    )
    return made


def summed_up(tensor: Tensor) -> Tensor:
    """A DTensor of which no process has only an addend (Partial); another tensor itself."""
    if not is_dtensor(tensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    replicate = sys.modules["torch.distributed.tensor"].Replicate()
    placements = [replicate if p.is_partial() else p for p in tensor.placements]
    total: Tensor = tensor.redistribute(placements=placements)
    return total


def sharding_of(tensor: Tensor) -> Sharding | None:
    """How a tensor is sharded; None where every process has all of it."""
    if not is_dtensor(tensor):
        return None
    spec = tensor._spec
    dims = tuple(d for d, placement in enumerate(spec.placements) if not placement.is_replicate())
    return Sharding(spec.mesh, dims) if dims else None


def shard_number(tensor: Tensor) -> int:
    """Which of its shards this process has, 0 for the first and for a tensor that is whole.

    It is the same on replicas.
    """
    sharding = sharding_of(tensor)
    coordinate = sharding.mesh.get_coordinate() if sharding is not None else None
    if sharding is None or coordinate is None:
        return 0
    number = 0
    for dim in sharding.dims:
        number = number * sharding.mesh.size(dim) + coordinate[dim]
    return number


def same_layout(tensor: Tensor, param: Tensor) -> bool:
    """Whether two DTensors have the same mesh and placements, or both are no DTensors."""
    if not (is_dtensor(tensor) and is_dtensor(param)):
        return is_dtensor(tensor) == is_dtensor(param)
    return _layout(tensor) == _layout(param)


def local_gradient(param: Tensor, grad: Tensor, redistributed: dict[Tensor, Tensor]) -> Tensor:
    """What this process needs of the gradient of a DTensor.

    Args:
        param: a DTensor.
        grad: its gradient, of any placements on the same mesh.
        redistributed: gradients brought to their parameters' placements in this step. Each is
            brought there once, since a process that asks twice would be alone with a collective.

    Raises:
        RuntimeError: if the gradient cannot have the parameter's layout.
    """
    if not same_layout(grad, param):
        if grad not in redistributed:
            redistributed[grad] = _redistributed(grad, param)
        grad = redistributed[grad]
    return local_tensor(grad)


def total_over_shards(
    values: Sequence[Tensor], shardings: Sequence[Sharding | None]
) -> list[Tensor]:
    """Sum what each process has found for its shards.

    Args:
        values: one-dimensional; of the same lengths in the same order on every process.
        shardings: for each, over which shards to sum; None leaves it as it is. There is one
            collective for each dimension of a mesh that occurs.

    Raises:
        RuntimeError: if this process is not part of a mesh, and so cannot know the sum.
    """
    totals = list(values)
    axes: dict[Any, list[int]] = {}
    for i, sharding in enumerate(shardings):
        if sharding is not None:
            for dim in sharding.dims:
                axes.setdefault((sharding.mesh, dim, values[i].device), []).append(i)
    if any(mesh.get_coordinate() is None for mesh, _, _ in axes):
        raise RuntimeError(
            "a sum over all shards is known only on the processes of the parameter's mesh, of "
            f"which process {torch.distributed.get_rank()} is none"
        )
    for (mesh, dim, _), which in axes.items():
        joined = torch.cat([totals[i] for i in which])
        torch.distributed.all_reduce(joined, group=mesh.get_group(dim))
        parts = joined.split([len(totals[i]) for i in which])
        for i, part in zip(which, parts, strict=True):
            totals[i] = part
    return totals


def _layout(tensor: DTensor) -> tuple[Any, ...]:
    spec = tensor._spec
    return spec.mesh, spec.placements, getattr(spec, "shard_order", None)


def _redistributed(grad: Tensor, param: Tensor) -> Tensor:
    if is_dtensor(grad) and is_dtensor(param) and grad.device_mesh == param.device_mesh:
        moved: Tensor = grad.redistribute(placements=param.placements)
        if same_layout(moved, param):
            return moved
    raise RuntimeError("the gradient of a DTensor must be a DTensor of the same mesh")
