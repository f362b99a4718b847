"""Stochastic rounding: the same on replicas, different across shards."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.optim import Optimizer

import effkern
from tests.distributed.processes import Processes
from tests.distributed.tensors import distributed, mesh


def _rounded(kind: type[Optimizer]) -> list[list[float]]:
    """Local parameters after a step in which every element is rounded from the same value."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)  # as programs do for their data
    hows = [(mesh(2), [Replicate(), Shard(0)]), (mesh(1), [Shard(0)]), (mesh(1), [Replicate()])]
    value = torch.ones(400, dtype=torch.bfloat16)
    params = [torch.nn.Parameter(distributed(value, how)) for how in hows]
    params.append(torch.nn.Parameter(value.clone()))  # as under DistributedDataParallel
    optimizer = kind(params, lr=1e-3, stochastic_rounding=True)
    for p, how in zip(params, [*hows, None], strict=True):
        p.grad = distributed(value, how)
    optimizer.step()
    locals_ = [getattr(p, "_local_tensor", p).tolist() for p in params]
    assert all(len(set(values)) == 2 for values in locals_)
    return locals_


@pytest.mark.parametrize("kind", [effkern.FusedSGD, effkern.FusedLAMB], ids=lambda k: k.__name__)
def test_replicas_round_alike_and_shards_do_not(kind: type[Optimizer], four: Processes) -> None:
    hybrid, sharded, replicated, plain = zip(*four.run(_rounded, kind), strict=True)
    assert hybrid[0] == hybrid[2] != hybrid[1] == hybrid[3]
    assert len(set(map(tuple, sharded))) == 4
    assert len(set(map(tuple, replicated))) == len(set(map(tuple, plain))) == 1
    assert replicated[0] != plain[0]
