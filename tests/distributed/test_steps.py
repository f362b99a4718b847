"""Every optimizer on DTensors of many layouts in one group, beside what it must agree with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.optim import Optimizer

import effkern
from tests.distributed.processes import Processes
from tests.distributed.tensors import distributed, layouts, mesh, parameters, whole
from tests.support.twins import TORCH_TWIN

_STEPS = 4

#: Options that reach every state of each class.
_OPTIONS: dict[type[Optimizer], dict[str, Any]] = {
    effkern.FusedAdam: {"weight_decay": 0.1, "eps": 1e-3, "amsgrad": True},
    effkern.FusedAdamW: {"eps": 1e-3},
    effkern.FusedSGD: {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
    effkern.FusedAdagrad: {"eps": 1e-3, "lr_decay": 0.2},
    effkern.FusedRMSprop: {"centered": True, "momentum": 0.5, "alpha": 0.9, "eps": 1e-2},
    effkern.FusedAdadelta: {"rho": 0.5, "weight_decay": 0.1},
    effkern.FusedLion: {"weight_decay": 0.1},
    effkern.FusedLAMB: {"weight_decay": 0.1, "eps": 1e-3},
}


def _values(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape, _ in layouts()]
    values[4].zero_()  # of one tensor no norm is known
    return values


def _train(
    optimizer: Optimizer, hows: list[Any], steps: int = _STEPS, dtype: torch.dtype = torch.float32
) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for p, value, how in zip(params, _values(100 + step, dtype), hows, strict=True):
            p.grad = distributed(value, how)
        optimizer.step()


def _assert_equal(mine: list[Any], theirs: list[Any], **tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        torch.testing.assert_close(whole(a), whole(b), msg=lambda m, i=i: f"{i}: {m}", **tolerance)


def _agrees_with_torch(kind: type[Optimizer], backend: str) -> None:
    hows = [how for _, how in layouts()]
    options = _OPTIONS[kind]
    with effkern.use_backend(backend):
        mine = kind(parameters(_values(1), hows), **options)
        _train(mine, hows)
    twin = TORCH_TWIN[kind]
    theirs = twin(parameters(_values(1), hows), foreach=False, **options)
    _train(theirs, hows)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    for p, q in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        _assert_equal([p], [q], **tolerance)
        mine_of, theirs_of = mine.state[p], theirs.state[q]
        assert list(mine_of) == list(theirs_of)
        for key, value in theirs_of.items():
            assert type(mine_of[key]) is type(value)
            if isinstance(value, DTensor):
                assert mine_of[key]._spec == value._spec
            _assert_equal([mine_of[key]], [value], **tolerance)


@pytest.mark.parametrize("kind", TORCH_TWIN, ids=lambda kind: kind.__name__)
def test_steps_and_states_are_those_of_torch(kind: type[Optimizer], four: Processes) -> None:
    four.run(_agrees_with_torch, kind, "cpu")


def test_the_reference_backend_too(two: Processes) -> None:
    two.run(_agrees_with_torch, effkern.FusedAdamW, "reference")


def _agrees_with_one_process(kind: type[Optimizer], options: dict[str, Any]) -> None:
    hows = [how for _, how in layouts()]
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    options = _OPTIONS[kind] | options
    mine = kind(parameters(_values(1, dtype), hows), **options)
    _train(mine, hows, dtype=dtype)
    alone = kind(parameters(_values(1, dtype), [None] * len(hows)), **options)
    _train(alone, [None] * len(hows), dtype=dtype)
    # Blocks of 8 bits are cut within a shard.
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    if "state_dtype" in options:
        tolerance = {"rtol": 2e-2, "atol": 2e-2}
    elif dtype == torch.bfloat16:
        tolerance = {"rtol": 8e-3, "atol": 1e-3}
    _assert_equal(mine.param_groups[0]["params"], alone.param_groups[0]["params"], **tolerance)


@pytest.mark.parametrize("kind", _OPTIONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 0.5}, {"master_weights": True}, {"state_dtype": "int8"}],
    ids=lambda options: next(iter(options)),
)
def test_steps_are_those_of_one_process(
    kind: type[Optimizer], options: dict[str, Any], four: Processes
) -> None:
    four.run(_agrees_with_one_process, kind, options)


def _other_placements() -> None:
    kinds = effkern.FusedAdamW, effkern.FusedLAMB
    for kind in kinds:
        value, grads = torch.randn(6, 5), [torch.randn(6, 5) for _ in range(4)]
        mine = torch.nn.Parameter(distributed(value, (mesh(1), [Shard(0)])))
        alone = torch.nn.Parameter(value.clone())
        optimizers = kind([mine], max_grad_norm=1.0), kind([alone], max_grad_norm=1.0)
        world = mesh(1).size()
        for step, grad in enumerate(grads):
            if step == 0:
                mine.grad = DTensor.from_local(grad / world, mesh(1), [Partial()])
            else:
                how = [Replicate(), Shard(1), Shard(0)][step - 1]
                mine.grad = distributed(grad, (mesh(1), [how]))
            given = mine.grad
            if step == 2 and torch.distributed.get_rank() == 0:
                # This process alone must prepare its calls anew.
                mine._local_tensor.data = mine._local_tensor.clone()
            alone.grad = grad.clone()
            for optimizer in optimizers:
                optimizer.step()
            assert mine.grad is given
            _assert_equal([mine], [alone], rtol=1e-5, atol=1e-6)


def test_gradients_of_other_placements(four: Processes) -> None:
    four.run(_other_placements)


def _exchanged() -> None:
    value, how = torch.randn(10, 3), (mesh(1), [Shard(0)])
    mine, other = (torch.nn.Parameter(distributed(value, how)) for _ in range(2))
    optimizers = effkern.FusedAdamW([mine]), effkern.FusedAdamW([other])
    for step in range(4):
        for p in (mine, other):
            p.grad = distributed(torch.full((10, 3), 1.0 + step), how)
        before = mine._local_tensor
        if step == 1:
            mine._local_tensor = before.clone()
        elif step == 2:
            exp_avg = optimizers[0].state[mine]["exp_avg"]
            exp_avg._local_tensor = exp_avg._local_tensor.clone()
        kept = before.clone()
        for optimizer in optimizers:
            optimizer.step()
        if step == 1 and kept.numel():
            torch.testing.assert_close(before, kept, rtol=0, atol=0)
        _assert_equal([mine], [other], rtol=0, atol=0)


def test_a_local_tensor_exchanged_inside_its_dtensor(four: Processes) -> None:
    four.run(_exchanged)


def _versions() -> None:
    p = torch.nn.Parameter(distributed(torch.ones(8, 2), (mesh(1), [Shard(0)])))
    optimizer = effkern.FusedAdam([p])
    p.grad = distributed(torch.ones(8, 2), (mesh(1), [Shard(0)]))
    optimizer.step()
    written = [p, p._local_tensor, optimizer.state[p]["exp_avg"]]
    before = [t._version for t in written]
    optimizer.step()
    assert all(t._version > version for t, version in zip(written, before, strict=True))


def test_version_counters_rise(two: Processes) -> None:
    two.run(_versions)


def _scaled(found: float) -> None:
    hows = [how for _, how in layouts()]
    mine = effkern.FusedLAMB(parameters(_values(1), hows))
    alone = effkern.FusedLAMB(parameters(_values(1), [None] * len(hows)))
    for optimizer, how in ((mine, hows), (alone, [None] * len(hows))):
        _train(optimizer, how, steps=1)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
        _train(optimizer, how, steps=1)
        optimizer.grad_scale = optimizer.found_inf = None
        _train(optimizer, how, steps=1)
    mine_of, alone_of = (o.param_groups[0]["params"] for o in (mine, alone))
    _assert_equal(mine_of, alone_of, rtol=1e-5, atol=1e-6)
    for p, q in zip(mine_of, alone_of, strict=True):
        assert mine.state[p]["step"] == alone.state[q]["step"] == (2 if found else 3)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_sharded_lamb_under_a_gradient_scaler(found: float, four: Processes) -> None:
    four.run(_scaled, found)


def _lr_tensor_and_maximize() -> None:
    hows = [how for _, how in layouts()]
    options = {"lr": torch.tensor(2e-3), "maximize": True, "betas": (0.7, 0.9)}
    mine = effkern.FusedLAMB(parameters(_values(1), hows), **options)
    alone = effkern.FusedLAMB(parameters(_values(1), [None] * len(hows)), **options)
    _train(mine, hows)
    _train(alone, [None] * len(hows))
    _assert_equal(
        mine.param_groups[0]["params"], alone.param_groups[0]["params"], rtol=1e-5, atol=1e-6
    )


def test_sharded_lamb_ascends_with_lr_in_a_tensor(four: Processes) -> None:
    four.run(_lr_tensor_and_maximize)


def _compiled() -> None:
    value, how = torch.randn(10, 3), (mesh(1), [Shard(0)])
    mine, other = (torch.nn.Parameter(distributed(value, how)) for _ in range(2))
    optimizers = effkern.FusedLAMB([mine]), effkern.FusedLAMB([other])
    step = torch.compile(optimizers[0].step, backend="eager")
    for scale in (1.0, 2.0):
        for p in (mine, other):
            p.grad = distributed(scale * value, how)
        step()
        optimizers[1].step()
        _assert_equal([mine], [other], rtol=0, atol=0)
    assert optimizers[0].state[mine]["step"] == 2


def test_a_step_under_compile(two: Processes) -> None:
    two.run(_compiled)


def _compiled() -> None:
    """A graph cannot hold the step: it runs beside it."""
    values, how = [torch.randn(5, 2), torch.randn(3)], (mesh(1), [Shard(0)])
    mine, theirs = (parameters(values, [how, how]) for _ in range(2))
    optimizer, eager = (effkern.FusedAdamW(p, max_grad_norm=0.5) for p in (mine, theirs))
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(2):
        for p, q, value in zip(mine, theirs, values, strict=True):
            p.grad, q.grad = distributed(value, how), distributed(value, how)
        step()
        eager.step()
        _assert_equal(mine, theirs, rtol=0, atol=0)
        assert torch.equal(optimizer.last_grad_norm, eager.last_grad_norm)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()


def test_a_compiled_step(two: Processes) -> None:
    two.run(_compiled)
