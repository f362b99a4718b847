"""Every optimizer beside its twin, step after step: dtypes, flags, groups, layouts, checkpoints."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

import effkern
from tests.support.backends import Backend
from tests.support.twins import TORCH_TWIN, TWIN, Twins

#: Options of each class that reach every branch of its rule.
FLAGS: dict[type[Optimizer], list[dict[str, Any]]] = {
    effkern.FusedAdam: [
        {"weight_decay": 0.1, "eps": 1e-3},
        {"amsgrad": True, "eps": 1e-3},
        {"decoupled_weight_decay": True, "weight_decay": 0.1, "eps": 1e-3, "maximize": True},
    ],
    effkern.FusedAdamW: [{"eps": 1e-3}, {"amsgrad": True, "betas": (0.7, 0.9), "eps": 1e-3}],
    effkern.FusedSGD: [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
    ],
    effkern.FusedAdagrad: [
        {"eps": 1e-3},
        {"lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
        {"maximize": True, "eps": 1e-3},
    ],
    effkern.FusedRMSprop: [
        {"eps": 1e-3},
        {"centered": True, "alpha": 0.9, "weight_decay": 0.1, "eps": 1e-2},
        {"momentum": 0.8, "eps": 1e-2, "maximize": True},
        {"centered": True, "momentum": 0.5, "alpha": 0.9, "eps": 1e-2},
    ],
    effkern.FusedAdadelta: [{"eps": 1e-3}, {"rho": 0.5, "weight_decay": 0.1, "maximize": True}],
    effkern.FusedLion: [{}, {"betas": (0.87, 0.95), "weight_decay": 0.1, "maximize": True}],
    effkern.FusedLAMB: [{"eps": 1e-3}, {"weight_decay": 0.1, "maximize": True, "eps": 1e-3}],
}
KINDS = pytest.mark.parametrize("kind", TWIN, ids=lambda k: k.__name__)
WITH_FLAGS = pytest.mark.parametrize(
    ("kind", "flags"),
    [(kind, flags) for kind in TWIN for flags in FLAGS[kind]],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x),
)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
        torch.complex128,
    ],
    ids=lambda d: str(d).removeprefix("torch."),
)


def some_params(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(s, dtype=dtype, device=device) for s in ((4, 3), (), (17,), (0, 2))]


def with_all_flags(kind: type[Optimizer]) -> dict[str, Any]:
    return {**FLAGS[kind][-1], "lr": 0.05}


@pytest.mark.parametrize("kind", TORCH_TWIN, ids=lambda k: k.__name__)
def test_it_takes_what_torchs_class_takes(kind: type[Optimizer]) -> None:
    """Every argument under its name, in its place, with its default."""
    theirs = inspect.signature(TORCH_TWIN[kind]).parameters
    mine = inspect.signature(kind).parameters
    assert {n: p.default for n, p in theirs.items()}.items() <= {
        n: p.default for n, p in mine.items()
    }.items()
    ordered = [n for n, p in theirs.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in mine.items() if p.kind == p.POSITIONAL_OR_KEYWORD] == ordered
    assert getattr(kind([torch.zeros(1)]), "_step_supports_amp_scaling", False) == (
        "fused" in theirs
    )


@WITH_FLAGS
@DTYPES
def test_many_steps(
    backend: Backend, kind: type[Optimizer], flags: dict[str, Any], dtype: torch.dtype
) -> None:
    narrow = dtype in (torch.bfloat16, torch.float16)
    twins = Twins(some_params(dtype, backend.device), kind, **{"lr": 0.01, **flags})
    for _ in range(1 if backend.slow or narrow else 12):
        twins.step()


@KINDS
def test_groups_of_their_own(backend: Backend, kind: type[Optimizer]) -> None:
    groups = [
        {"params": some_params(device=backend.device), **flags, "lr": 0.01 * (1 + i)}
        for i, flags in enumerate(FLAGS[kind])
    ]
    twins = Twins(groups, kind)
    for _ in range(1 if backend.slow else 4):
        twins.step()


@KINDS
def test_dtypes_in_one_group(backend: Backend, kind: type[Optimizer]) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.float32)
    params = [torch.randn(5, dtype=dtype, device=backend.device) for dtype in dtypes]
    twins = Twins(params, kind, lr=0.01)
    for _ in range(2):
        twins.step()


@KINDS
def test_gradients_come_and_go(backend: Backend, kind: type[Optimizer]) -> None:
    twins = Twins(some_params(device=backend.device), kind, **with_all_flags(kind))
    for which in ([0, 2], [0, 1, 2, 3], [1], [], [0, 1, 2, 3]):
        twins.step(which)


def conjugated(p: Tensor) -> Tensor:
    return torch.randn(p.shape, dtype=p.dtype, device=p.device).conj()


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 6).t(),
    "sliced": lambda: torch.randn(6, 8)[::2, ::2],
    "complex": lambda: torch.randn(3, 4, dtype=torch.complex64),
    "complex transposed": lambda: torch.randn(3, 4, dtype=torch.complex64).t(),
    "complex sliced": lambda: torch.randn(6, 8, dtype=torch.complex64)[::2, ::2],
}
GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda p: torch.randn(p.shape, dtype=p.dtype, device=p.device),
    "expanded": lambda p: torch.randn((), dtype=p.dtype, device=p.device).expand(p.shape),
    "sliced": lambda p: torch.randn((*p.shape, 2), dtype=p.dtype, device=p.device)[..., 0],
    "conjugated": conjugated,
    "zeros without memory": lambda p: torch._efficientzerotensor(
        p.shape, dtype=p.dtype, device=p.device
    ),
}


@KINDS
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, kind: type[Optimizer], layout: str, grad: str) -> None:
    if backend.slow and kind not in (effkern.FusedAdam, effkern.FusedLAMB):
        pytest.skip("layouts are dealt with before the rule")
    params = [LAYOUTS[layout]().to(backend.device), torch.randn(5, device=backend.device)]
    twins = Twins(params, kind, **with_all_flags(kind))
    for _ in range(2):
        twins.new_grads()
        twins.mine[0].grad = GRADS[grad](twins.mine[0].detach())
        twins.theirs[0].grad = twins.mine[0].grad.to("cpu", twins.theirs[0].dtype).clone()
        twins.both(lambda optimizer: optimizer.step())
        twins.check()


@KINDS
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scheduler(backend: Backend, kind: type[Optimizer], as_tensor: bool) -> None:
    lr: Any = torch.tensor(0.1) if as_tensor else 0.1
    twins = Twins(some_params(device=backend.device), kind, **{**with_all_flags(kind), "lr": 0.1})
    twins.optimizer.param_groups[0]["lr"] = lr
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4)
        for o in (twins.optimizer, twins.twin)
    ]
    for _ in range(3):
        twins.step()
        for scheduler in schedulers:
            scheduler.step()


@KINDS
@pytest.mark.parametrize("grad_scale", [None, 8.0, 3.0])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_scaled_gradients_and_infinities(
    backend: Backend, kind: type[Optimizer], grad_scale: float | None, found_inf: float | None
) -> None:
    """As torch.amp.GradScaler sets them, in all combinations."""
    twins = Twins(some_params(device=backend.device), kind, **with_all_flags(kind))
    for _ in range(2):
        twins.new_grads()
        kept = [p.detach().clone() for p in twins.mine]
        for p in twins.mine:
            p.grad = p.grad * (grad_scale or 1.0)
        grads = [p.grad.clone() for p in twins.mine]
        for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            tensor = None if value is None else torch.tensor(value, device=backend.device)
            setattr(twins.optimizer, name, tensor)
        twins.optimizer.step()
        del twins.optimizer.grad_scale, twins.optimizer.found_inf
        assert all(torch.equal(p.grad, g) for p, g in zip(twins.mine, grads, strict=True))
        if found_inf:
            assert all(map(torch.equal, twins.mine, kept))
            counted = [s["step"].item() for s in twins.optimizer.state.values() if "step" in s]
            assert not any(counted)
        else:
            twins.twin.step()
            twins.check()
    if found_inf:  # and then it goes on as if nothing had been
        twins.step()


@KINDS
def test_a_grad_scaler(kind: type[Optimizer]) -> None:
    """torch.amp.GradScaler on the CPU: an infinite gradient is skipped, the others count."""
    twins = Twins([torch.randn(4, 3), torch.randn(5)], kind, **with_all_flags(kind))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for i in range(4):
        twins.new_grads()
        for p in twins.mine:
            p.grad = p.grad * scaler.get_scale()
        if i == 2:
            twins.mine[1].grad[0] = float("inf")
        scaler._lazy_init_scale_growth_tracker(torch.device("cpu")) if i == 0 else None
        scaler.step(twins.optimizer)
        scaler.update()
        if i != 2:
            twins.twin.step()
        twins.check()
    assert scaler.get_scale() == 32.0


def trained(kind: type[Optimizer], **options: Any) -> tuple[list[Tensor], Optimizer]:
    torch.manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((4, 3), (), (9,))]
    optimizer = kind(params, **options)
    train(params, optimizer, seed=4)
    return params, optimizer


def train(params: list[Tensor], optimizer: Optimizer, seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@WITH_FLAGS
@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_a_training_goes_on_in_the_other_class(
    kind: type[Optimizer], flags: dict[str, Any], direction: str
) -> None:
    if kind not in TORCH_TWIN:
        pytest.skip("torch has no such optimizer")
    kinds = [kind, TORCH_TWIN[kind]]
    if direction == "from torch":
        kinds.reverse()
    options = {**flags, "lr": 0.05}
    params, first = trained(kinds[0], **options)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    second = kinds[1](others, **options)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    for made, of in ((params, first), (others, second)):
        train(made, of, seed=5)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert list(first.state[a]) == list(second.state[b])
        for name, value in first.state[a].items():
            torch.testing.assert_close(value, second.state[b][name], rtol=1e-5, atol=1e-6)


@WITH_FLAGS
def test_state_dict_has_torchs_layout(kind: type[Optimizer], flags: dict[str, Any]) -> None:
    if kind not in TORCH_TWIN:
        pytest.skip("torch has no such optimizer")

    def layout(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, layout(one)) for key, one in value.items()]
        if isinstance(value, (list, tuple)):
            return [layout(one) for one in value]
        if isinstance(value, Tensor):
            return value.dtype, value.shape, value.stride(), value.device, value.requires_grad
        return value

    found = [trained(made, **flags)[1].state_dict() for made in (kind, TORCH_TWIN[kind])]
    assert layout(found[0]) == layout(found[1])


@KINDS
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_go_on_alike(kind: type[Optimizer], way: str) -> None:
    params, optimizer = trained(kind, **with_all_flags(kind))
    if way == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        other = kind([torch.nn.Parameter(p.detach().clone()) for p in params])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    theirs = other.param_groups[0]["params"]
    train(theirs, other, seed=7)
    train(params, optimizer, seed=7)
    assert all(map(torch.equal, params, theirs))


@KINDS
def test_a_skipped_first_step_leaves_a_first_step(kind: type[Optimizer]) -> None:
    """What is new stays new when an infinity is found, whatever makes the plan anew."""
    params, _ = trained(kind)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    options = with_all_flags(kind)
    if kind is effkern.FusedSGD:
        options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
    skipped, plain = kind(params, **options), kind(others, **options)
    for p in params:
        p.grad = torch.full_like(p, float("inf"))
    skipped.found_inf = torch.tensor(1.0)
    skipped.step()
    del skipped.found_inf
    params[0].data = params[0].data.clone()
    for made, of in ((params, skipped), (others, plain)):
        train(made, of, seed=9, steps=2)
    assert all(map(torch.equal, params, others))


@KINDS
def test_version_counters_rise(backend: Backend, kind: type[Optimizer]) -> None:
    params = [torch.nn.Parameter(p) for p in some_params(device=backend.device)]
    optimizer = kind(params, **with_all_flags(kind))
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        states = [t for state in optimizer.state.values() for t in state.values()]
        before = [t._version for t in (*params, *states)]
        grads = [p.grad._version for p in params]
        optimizer.step()
        assert all(t._version > v for t, v in zip((*params, *states), before, strict=True))
        assert [p.grad._version for p in params] == grads


@KINDS
def test_a_step_writes_nothing_but_its_own(kind: type[Optimizer]) -> None:
    params, optimizer = trained(kind)
    grads = [p.grad.clone() for p in params]
    for p in params:
        p.grad.requires_grad_()  # as a gradient of higher order does
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert all(p.is_leaf and p.requires_grad for p in params)


@KINDS
def test_fake_tensors(kind: type[Optimizer]) -> None:
    """As what estimates a training's memory runs it: states as a real step makes them."""
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), ())]
        optimizer = kind(params, **FLAGS[kind][-1])
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    real = [torch.nn.Parameter(torch.zeros(p.shape)) for p in params]
    other = kind(real, **FLAGS[kind][-1])
    for p in real:
        p.grad = torch.ones_like(p)
    other.step()
    for fake, p in zip(params, real, strict=True):
        mine, theirs = (
            {k: (v.shape, v.dtype) for k, v in one.items()}
            for one in (optimizer.state.get(fake, {}), other.state.get(p, {}))
        )
        assert mine == theirs


@KINDS
def test_sparse_gradients_are_refused(backend: Backend, kind: type[Optimizer]) -> None:
    param = torch.nn.Parameter(torch.randn(4, 3, device=backend.device))
    before = param.detach().clone()
    optimizer = kind([param])
    param.grad = torch.ones_like(param).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(param, before)


@KINDS
@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": -0.1}])
def test_numbers_out_of_range(kind: type[Optimizer], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"Invalid (learning rate|weight_decay value)"):
        kind([torch.zeros(1)], **options)
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        kind([torch.zeros(1)], lr=torch.ones(2))
    with pytest.raises(RuntimeError, match="does not support differentiable=True"):
        kind([torch.zeros(1)], differentiable=True)
