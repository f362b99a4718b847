"""torch.distributed.checkpoint: a training goes on from a checkpoint of more or fewer processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import effkern
from tests.distributed.processes import Processes
from tests.distributed.tensors import distributed, mesh, whole

_WIDE = {"state_dtype": torch.float32, "master_weights": True}
_CASES: list[tuple[type[Optimizer], dict[str, Any], torch.dtype]] = [
    (effkern.FusedAdamW, {}, torch.float32),
    (effkern.FusedAdam, {**_WIDE, "amsgrad": True}, torch.bfloat16),
    (effkern.FusedSGD, {"momentum": 0.9, "dampening": 0.5}, torch.float32),
    (effkern.FusedLion, {"state_dtype": torch.bfloat16}, torch.float32),
    (effkern.FusedLAMB, {}, torch.float32),
    (effkern.FusedAdamW, {"state_dtype": "int8"}, torch.float32),
]


def _model(dtype: torch.dtype) -> torch.nn.Sequential:
    """Sharded, with shards of every size down to none."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    model = model.to(dtype)
    fully_shard(model, mesh=mesh(1))
    return model


def _step(model: torch.nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(10 * step + i)
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = distributed(grad, (p.device_mesh, p.placements))
        optimizer.step()
        optimizer.zero_grad()  # torch makes states to load into only where there is no gradient


def _tensors(model: torch.nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
    of_states = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return [whole(t) for t in [*model.parameters(), *of_states]]


def _save(
    folder: str, kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Train, save, and train on for a step."""
    model = _model(dtype)
    optimizer = kind(model.parameters(), lr=0.05, **options)
    _step(model, optimizer, range(3))
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder)
    _step(model, optimizer, range(3, 5))
    return _tensors(model, optimizer)


def _load(
    folder: str, kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> list[torch.Tensor]:
    model = _model(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = kind(model.parameters(), lr=0.5, **options)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    _step(model, optimizer, range(3, 5))
    states = [v for s in optimizer.state.values() for k, v in s.items() if "exp_avg" in k]
    in_blocks = options.get("state_dtype") == "int8"
    assert all(isinstance(v, DTensor) != in_blocks for v in states)
    return _tensors(model, optimizer)


@pytest.mark.parametrize(
    ("kind", "options", "dtype"), _CASES, ids=[f"{c[0].__name__}-{[*c[1]]}" for c in _CASES]
)
def test_saved_by_four_loaded_by_two_and_back(
    kind: type[Optimizer],
    options: dict[str, Any],
    dtype: torch.dtype,
    two: Processes,
    four: Processes,
    tmp_path: Path,
) -> None:
    # Other blocks of 8 bits where the shards are others.
    rounded = {"rtol": 0.05, "atol": 5e-3}
    tolerance = rounded if options.get("state_dtype") == "int8" else {"rtol": 1e-6, "atol": 1e-7}
    for i, (saves, loads) in enumerate([(four, two), (two, four), (four, four)]):
        folder = str(tmp_path / str(i))
        (saved, *_) = saves.run(_save, folder, kind, options, dtype)
        if saves is loads:
            tolerance = {"rtol": 1e-6, "atol": 1e-7}
        for loaded in loads.run(_load, folder, kind, options, dtype):
            assert len(loaded) == len(saved)
            for a, b in zip(loaded, saved, strict=True):
                torch.testing.assert_close(a, b, **tolerance)


def _full_state(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """One state_dict of whole tensors, from and into sharded ones."""
    model = _model(torch.float32)
    optimizer = kind(model.parameters(), **options)
    _step(model, optimizer, range(3))
    full = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=full)
    other = kind(model.parameters(), **options)
    set_optimizer_state_dict(model, other, copy.deepcopy(state), options=full)
    params = get_model_state_dict(model)
    values = {key: value.clone() for key, value in params.items()}
    _step(model, optimizer, range(3, 4))
    expected = _tensors(model, optimizer)
    set_model_state_dict(model, values)
    _step(model, other, range(3, 4))
    for a, b in zip(_tensors(model, other), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=str)
def test_a_full_state_dict(options: dict[str, Any], two: Processes) -> None:
    two.run(_full_state, effkern.FusedAdamW, options)


def _into_torch() -> None:
    """From effkern's class into torch's, in the middle of a training, and back."""
    model = _model(torch.float32)
    mine = effkern.FusedAdamW(model.parameters())
    _step(model, mine, range(3))
    start = {key: value.clone() for key, value in get_model_state_dict(model).items()}
    saved = mine.state_dict()
    results = []
    for kind in (effkern.FusedAdamW, torch.optim.AdamW):
        set_model_state_dict(model, start)
        optimizer = kind(model.parameters())
        optimizer.load_state_dict(copy.deepcopy(saved))
        _step(model, optimizer, range(3, 5))
        back = effkern.FusedAdamW(model.parameters())
        back.load_state_dict(optimizer.state_dict())
        _step(model, back, range(5, 6))
        results.append(_tensors(model, back))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_into_the_class_of_torch_and_back(two: Processes) -> None:
    two.run(_into_torch)


def _copied() -> None:
    model = _model(torch.float32)
    optimizer = effkern.FusedAdamW(model.parameters())
    _step(model, optimizer, range(3))
    other = copy.deepcopy(optimizer)
    _step(model, optimizer, range(3, 4))
    params = other.param_groups[0]["params"]
    _step(torch.nn.ParameterList(params), other, range(3, 4))
    for p, q in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=0, atol=0)


def test_an_optimizer_copied_with_its_parameters(two: Processes) -> None:
    two.run(_copied)
