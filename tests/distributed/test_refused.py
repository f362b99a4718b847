"""What is refused of DTensors: with the parameter's name, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import effkern
from tests.distributed.processes import Processes
from tests.distributed.tensors import distributed, mesh


def _parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(distributed(torch.ones(6, 2), (mesh(1), [Shard(0)])))


def _refused(optimizer: torch.optim.Optimizer, p: Tensor, message: str) -> None:
    before = p._local_tensor.clone()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(p._local_tensor, before)  # type: ignore[attr-defined]


def _gradient(elsewhere: bool, prepared: bool) -> None:
    p = _parameter()
    optimizer = effkern.FusedAdam([("weight", p)])
    if prepared:
        p.grad = distributed(torch.ones(6, 2), (mesh(1), [Shard(0)]))
        optimizer.step()
    other = init_device_mesh("cpu", (1, mesh(1).size()))
    how = (other, [Replicate(), Shard(0)]) if elsewhere else None
    p.grad = distributed(torch.ones(6, 2), how)
    _refused(optimizer, p, "gradient of parameter 'weight' must be a DTensor of the param")


def _partial_parameter() -> None:
    p = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh(1), [Partial()]))
    p.grad = DTensor.from_local(torch.ones(3), mesh(1), [Partial()])
    _refused(effkern.FusedLion([("weight", p)]), p, "parameter 'weight' must not be partial")


def _state(change: Callable[[Tensor], Any], message: str, **options: Any) -> None:
    p = _parameter()
    optimizer = effkern.FusedAdam([("weight", p)], **options)
    p.grad = distributed(torch.ones(6, 2), (mesh(1), [Shard(0)]))
    optimizer.step()
    state = optimizer.state[p]
    key = next(key for key in state if key.startswith("exp_avg"))
    state[key] = change(state[key])
    _refused(optimizer, p, message)


def _redistributed(value: Tensor) -> Tensor:
    return value.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor()  # type: ignore[attr-defined]


def _nothing(value: Tensor) -> dict[str, Any]:
    """As torch's loader of flattened states puts for a key that is not in the checkpoint."""
    return {}


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
def test_gradients_that_do_not_fit(elsewhere: bool, prepared: bool, two: Processes) -> None:
    two.run(_gradient, elsewhere, prepared)


def test_partial_parameters(two: Processes) -> None:
    two.run(_partial_parameter)


def test_states_that_do_not_fit(two: Processes) -> None:
    two.run(_state, _redistributed, "'exp_avg' of parameter 'weight' must be a DTensor of .*Shard")
    two.run(_state, _whole, "'exp_avg' of parameter 'weight' must be a DTensor of .*, got a plain")


def _codes() -> None:
    _state(_nothing, "'exp_avg_codes' of parameter 'weight' must have shape", state_dtype="int8")


def test_codes_that_are_none(two: Processes) -> None:
    two.run(_codes)


def _outside() -> None:
    """A process that has no part of a parameter cannot know its norm."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    part = torch.distributed.device_mesh.DeviceMesh("cpu", list(range(world - 1)))
    p = torch.nn.Parameter(distributed(torch.ones(6, 2), (part, [Shard(0)])))
    p.grad = distributed(torch.ones(6, 2), (part, [Shard(0)]))
    effkern.FusedAdam([p]).step()
    optimizer = effkern.FusedAdam([p], max_grad_norm=1.0)
    if rank == world - 1:
        _refused(optimizer, p, "only on the processes of the parameter's mesh")
    else:
        optimizer.step()
        torch.testing.assert_close(float(optimizer.last_grad_norm), 12.0**0.5)


def test_norms_on_a_process_outside_the_mesh(four: Processes) -> None:
    four.run(_outside)
