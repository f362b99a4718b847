"""The global gradient norm, over shards and not over replicas."""

from __future__ import annotations

import torch
from torch.distributed.tensor import Replicate, Shard

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
