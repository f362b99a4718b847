"""A model under `fully_shard`, trained beside the same model with PyTorch's optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import effkern
from tests.distributed.processes import Processes
from tests.distributed.tensors import mesh, whole


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(6, 10)
        self.down = torch.nn.Linear(10, 6)
        self.gain = torch.nn.Parameter(torch.ones(1))  # three of four processes have nothing of it

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.down(torch.tanh(self.up(x)))


def _model(kind: str) -> torch.nn.Module:
    torch.manual_seed(2)
    model = torch.nn.Sequential(_Block(), _Block())
    if kind == "tensor parallel":
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        for block in model:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, both["model"], plan)
            fully_shard(block, mesh=both["data"], ignored_params={block.gain})
        fully_shard(model, mesh=both["data"], ignored_params={block.gain for block in model})
        return model
    options: dict[str, Any] = {"mesh": mesh(2 if kind == "hybrid" else 1)}
    if kind == "mixed precision":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _data(step: int, kind: str) -> Tensor:
    # Tensor-parallel processes of one row of the mesh share their data.
    rank = torch.distributed.get_rank()
    rank = rank // 2 if kind == "tensor parallel" else rank
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def _trained(model: torch.nn.Module, optimizer: Any, kind: str, **options: Any) -> list[float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=options.get("scaled", False))
    losses = []
    for step in range(6):
        loss = (model(_data(step, kind)) - 1).square().mean()
        losses.append(float(loss))
        scaler.scale(loss).backward()
        if options.get("scaled") and step == 2:
            for p in model.parameters():
                local = getattr(p.grad, "_local_tensor", p.grad)
                local.fill_(float("inf"))
        if "clip" in options:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip"], foreach=False)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses


def _agrees(kind: str) -> None:
    models = _model(kind), _model(kind)
    # PyTorch's clipping takes one mesh only.
    clip = kind in ("sharded", "hybrid")
    mine = effkern.FusedAdamW(models[0].parameters(), lr=0.01, max_grad_norm=0.1 if clip else None)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=0.01, foreach=False)
    losses = _trained(models[0], mine, kind)
    expected = _trained(models[1], theirs, kind, **({"clip": 0.1} if clip else {}))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert losses[-1] < losses[0]
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=1e-5, atol=1e-6)
        assert isinstance(mine.state[p]["exp_avg"], DTensor) == isinstance(p, DTensor)


@pytest.mark.parametrize("kind", ["sharded", "hybrid", "mixed precision", "tensor parallel"])
def test_losses_are_those_of_the_stock_optimizer(kind: str, four: Processes) -> None:
    four.run(_agrees, kind)


def _scaled() -> None:
    models = _model("sharded"), _model("sharded")
    mine = effkern.FusedAdamW(models[0].parameters(), lr=0.01)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=0.01, foreach=False)
    losses = _trained(models[0], mine, "sharded", scaled=True)
    expected = _trained(models[1], theirs, "sharded", scaled=True)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert all(state["step"] == 5 for state in mine.state.values())


def test_a_gradient_scaler(four: Processes) -> None:
    four.run(_scaled)
