"""What `test_torchrun` starts: data-parallel trainings, effkern beside PyTorch."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import effkern


def losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Of eight steps, the mean over all processes."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    for _ in range(8):
        loss = (model(torch.randn(4, 5, generator=generator)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        found.append(float(mean))
    return found


def main() -> None:
    """Raise where the two differ."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    for wrap in (DistributedDataParallel, fully_shard):
        mine, theirs = wrap(copy.deepcopy(first)), wrap(copy.deepcopy(first))
        got = losses(mine, effkern.FusedAdamW(mine.parameters(), lr=0.02))
        expected = losses(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.02))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        if got[-1] > 0.8 * got[0]:
            raise AssertionError(f"the loss did not fall: {got}")
        if dist.get_rank() == 0:
            print(f"{wrap.__name__}: {got[0]:.4f} -> {got[-1]:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
