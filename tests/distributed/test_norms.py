"""The global gradient norm, over shards and not over replicas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import effkern
from tests.distributed.processes import Processes
from tests.distributed.tensors import distributed, layouts, mesh, parameters, whole


def _clips(kind: type[torch.optim.Optimizer], twin: type[torch.optim.Optimizer]) -> float:
    """On one mesh, which is all that PyTorch's function takes."""
    hows = [(mesh(1), [Shard(0)]), (mesh(1), [Shard(0)]), (mesh(1), [Replicate()])]
    values = [torch.randn(7, 3), torch.randn(2), torch.randn(4, 4)]
    mine, theirs = parameters(values, hows), parameters(values, hows)
    optimizer = kind(mine, lr=0.1, max_grad_norm=0.5)
    other = twin(theirs, lr=0.1, foreach=False)
    for step in range(3):
        for a, b, value, how in zip(mine, theirs, values, hows, strict=True):
            a.grad = distributed(value * (step + 1), how)
            b.grad = distributed(value * (step + 1), how)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False)
        optimizer.step()
        other.step()
        torch.testing.assert_close(optimizer.last_grad_norm, whole(norm), rtol=1e-6, atol=0)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(whole(a), whole(b), rtol=1e-5, atol=1e-6)
    return float(optimizer.last_grad_norm)


def test_clipping_is_that_of_torch(four: Processes) -> None:
    norms = four.run(_clips, effkern.FusedSGD, torch.optim.SGD)
    assert len(set(norms)) == 1
    four.run(_clips, effkern.FusedAdamW, torch.optim.AdamW)


def _norm_of_mixed_meshes(backend: str) -> float:
    hows = [how for _, how in layouts()]
    grads = [torch.randn(shape) for shape, _ in layouts()]
    params = parameters([torch.zeros_like(grad) for grad in grads], hows)
    # Two groups and two dtypes: several calls with the same shards.
    half = len(params) // 2
    with torch.no_grad():
        params[0] = torch.nn.Parameter(params[0].double())
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.1}]
    optimizer = effkern.FusedAdamW(groups, max_grad_norm=1.0)
    for p, grad, how in zip(params, grads, hows, strict=True):
        p.grad = distributed(grad.to(p.dtype), how)
    with effkern.use_backend(backend):
        optimizer.step()
    expected = torch.stack([grad.double().norm() for grad in grads]).norm()
    torch.testing.assert_close(optimizer.last_grad_norm, expected, rtol=1e-6, atol=0)
    return float(optimizer.last_grad_norm)


def test_the_norm_over_several_meshes(four: Processes) -> None:
    assert len(set(four.run(_norm_of_mixed_meshes, "cpu"))) == 1
    four.run(_norm_of_mixed_meshes, "reference")


def _with_gradients(grads: list[Tensor]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    return params


def _function_as_torch(max_norm: float) -> float:
    """On one mesh, which is all that PyTorch's function takes."""
    hows = [(mesh(1), [Shard(0)]), (mesh(1), [Shard(1)]), (mesh(1), [Replicate()])]
    values = [torch.randn(7, 3), torch.randn(2, 2), torch.randn(4, 4)]
    mine, theirs = (
        _with_gradients([distributed(v, how) for v, how in zip(values, hows, strict=True)])
        for _ in range(2)
    )
    versions = [p.grad._version for p in mine]
    found = effkern.clip_grad_norm_(mine, max_norm)
    right = torch.nn.utils.clip_grad_norm_(theirs, max_norm, foreach=False)
    assert type(found) is type(right)
    assert (found.shape, found.dtype) == (right.shape, right.dtype)
    torch.testing.assert_close(found.full_tensor(), right.full_tensor(), rtol=1e-6, atol=0)
    for a, b, how in zip(mine, theirs, hows, strict=True):
        assert list(a.grad.placements) == how[1]
        torch.testing.assert_close(whole(a.grad), whole(b.grad), rtol=1e-5, atol=1e-7)
    clipped = max_norm < float(found)
    assert [p.grad._version > v for p, v in zip(mine, versions, strict=True)] == [clipped] * 3
    return found.item()


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_the_function_is_torchs(max_norm: float, four: Processes) -> None:
    assert len(set(four.run(_function_as_torch, max_norm))) == 1


def _partial(value: Tensor, placements: list[Any], reduce_op: str = "sum") -> DTensor:
    """A DTensor of that value to which the processes contribute differently."""
    partial = [Partial(reduce_op) if p.is_partial() else p for p in placements]
    world = [mesh(len(placements)).size(d) for d, p in enumerate(placements) if p.is_partial()]
    rest = distributed(
        value, (mesh(len(placements)), [Replicate() if p.is_partial() else p for p in placements])
    )
    count = torch.tensor(world).prod().item()
    rank = torch.distributed.get_rank()
    local = rest.to_local() * (1 if reduce_op == "avg" else 1 / count)
    # Together nothing: on two processes of the dimension, or on four.
    local = local + (1.0 if rank < torch.distributed.get_world_size() / 2 else -1.0)
    return DTensor.from_local(
        local, rest.device_mesh, partial, shape=rest.shape, stride=rest.stride()
    )


def _function_on_everything(dtype: torch.dtype) -> float:
    hows = [how for _, how in layouts()]
    values = [torch.randn(shape).to(dtype) for shape, _ in layouts()]
    grads = [distributed(value, how) for value, how in zip(values, hows, strict=True)]
    more = [torch.randn(4, 3).double(), torch.randn(6).double(), torch.randn(8, 2).double()]
    grads += [
        _partial(more[0], [Partial()]),
        _partial(more[1], [Partial()], "avg"),
        _partial(more[2], [Partial(), Shard(0)]),
    ]
    values += more
    before = [getattr(grad, "placements", None) for grad in grads]
    params = _with_gradients(grads)
    found = effkern.clip_grad_norm_(params, 0.5)
    right = torch.stack([value.double().norm() for value in values]).norm()
    torch.testing.assert_close(found.full_tensor(), right, rtol=1e-9, atol=0)
    assert found.dtype == torch.float64
    eps = torch.finfo(dtype).eps
    for p, value, placements in zip(params, values, before, strict=True):
        assert getattr(p.grad, "placements", None) == placements
        expected = value.double() * (0.5 / (right + 1e-6))
        torch.testing.assert_close(whole(p.grad).double(), expected, rtol=2 * eps, atol=eps)
    return found.item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_function_on_several_meshes_and_partial_sums(
    dtype: torch.dtype, four: Processes
) -> None:
    """Neither of which PyTorch's function takes."""
    assert len(set(four.run(_function_on_everything, dtype))) == 1


def _not_finite() -> None:
    (param,) = _with_gradients([distributed(torch.randn(8, 2), (mesh(1), [Shard(0)]))])
    local = param.grad.to_local()
    if torch.distributed.get_rank() == 1:  # the others do not see it
        local[0, 0] = float("inf")
    before = local.clone()
    with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
        effkern.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
    assert torch.equal(local, before)


def test_an_infinity_on_one_process(four: Processes) -> None:
    four.run(_not_finite)
