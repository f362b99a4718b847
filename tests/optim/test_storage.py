"""master_weights, state_dtype and stochastic_rounding of every optimizer."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import effkern
from effkern.backends.reference.quantize import dequantized
from tests.support.backends import Backend
from tests.support.twins import TORCH_TWIN, TWIN, Twins

KINDS = pytest.mark.parametrize("kind", TWIN, ids=lambda k: k.__name__)
SHAPES = ((4, 3), (), (300,), (0, 2))


def make(
    kind: type[Optimizer], dtype: torch.dtype, device: str = "cpu", **options: Any
) -> tuple[list[Tensor], Optimizer]:
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s).to(dtype).to(device)) for s in SHAPES]
    return params, kind(params, **options)


def train(params: list[Tensor], optimizer: Optimizer, steps: int, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_train_like_float32(
    backend: Backend, kind: type[Optimizer], dtype: torch.dtype
) -> None:
    """Parameters are at each step the float32 training's, rounded."""
    if backend.slow and dtype is torch.float16:
        pytest.skip("bfloat16 takes the same way")
    params, optimizer = make(
        kind, dtype, backend.device, lr=0.01, master_weights=True, state_dtype=torch.float32
    )
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    twin = kind(wide, lr=0.01)
    for step in range(3):
        train(params, optimizer, 1, seed=step)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        twin.step()
        for p, w in zip(params, wide, strict=True):
            master = optimizer.state[p]["master_param"]
            assert master.dtype == torch.float32
            torch.testing.assert_close(master, w.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(p, master.to(dtype))


@KINDS
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
def test_states_are_stored_as_asked(
    backend: Backend, kind: type[Optimizer], state_dtype: Any
) -> None:
    params, optimizer = make(kind, torch.bfloat16, backend.device, lr=0.01, state_dtype=state_dtype)
    plain, other = make(kind, torch.float32, backend.device, lr=0.01)
    for p, q in zip(params, plain, strict=True):
        q.data.copy_(p.data)
    train(params, optimizer, 1)
    train(plain, other, 1)
    for p, q in zip(params, plain, strict=True):
        mine, theirs = optimizer.state[p], other.state[q]
        for name, value in theirs.items():
            if name == "step":
                assert mine["step"].item() == value.item()
            elif state_dtype == "int8":
                assert name not in mine
                codes, scales = mine[f"{name}_codes"], mine[f"{name}_scales"]
                assert codes.dtype in (torch.int8, torch.uint8)
                assert codes.stride() == p.stride()
                back = dequantized(codes, scales)
                most = value.abs().max().item() if value.numel() else 0.0
                torch.testing.assert_close(back, value, rtol=0.05, atol=most / 60 + 1e-9)
            else:
                assert mine[name].dtype == state_dtype
                torch.testing.assert_close(mine[name].float(), value, rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(p.float(), q, rtol=2e-2, atol=2e-2)


def test_no_second_moment_is_rounded_to_zero() -> None:
    """Gradients of very different sizes in one block: no step explodes."""
    param = torch.nn.Parameter(torch.zeros(256))
    optimizer = effkern.FusedAdam([param], lr=0.01, state_dtype="int8")
    sizes = 10.0 ** torch.linspace(-8, 0, 256)
    for _ in range(20):
        param.grad = sizes * torch.randn(256).sign()
        optimizer.step()
        assert (optimizer.state[param]["exp_avg_sq_codes"] > 0).all()
    assert param.abs().max() < 0.5


def test_eight_bits_train_like_thirty_two() -> None:
    def losses(**options: Any) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)
        )
        optimizer = effkern.FusedAdamW(model.parameters(), lr=3e-3, **options)
        found = []
        for _ in range(150):
            x = torch.randn(64, 16)
            loss = (model(x) - x[:, :4].sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    wide, narrow = losses(), losses(state_dtype="int8")
    assert sum(narrow[-20:]) < 1.1 * sum(wide[-20:])
    assert sum(wide[-20:]) < 0.3 * sum(wide[:20])


@KINDS
def test_stochastic_rounding_is_reproducible(backend: Backend, kind: type[Optimizer]) -> None:
    found = []
    for seed in (5, 5, 6):
        params, optimizer = make(
            kind, torch.bfloat16, backend.device, lr=0.01, stochastic_rounding=True
        )
        torch.manual_seed(seed)
        train(params, optimizer, 2)
        found.append(torch.cat([p.detach().reshape(-1) for p in params]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_small_updates_survive_stochastic_rounding() -> None:
    """To the nearest they would all be lost."""
    param = torch.nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
    optimizer = effkern.FusedSGD([param], lr=1.0, stochastic_rounding=True)
    for _ in range(50):
        param.grad = torch.full_like(param, -1e-4)
        optimizer.step()
    assert param.float().mean().item() == pytest.approx(1.005, abs=3e-4)


def test_parameters_of_one_shape_are_rounded_apart() -> None:
    params = [torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = effkern.FusedLion(params, lr=2.0**-9, stochastic_rounding=True)
    seen = []
    for _ in range(2):
        for p in params:
            p.data.fill_(1.0)
            p.grad = -torch.ones_like(p)
        optimizer.step()
        seen += [p.detach().clone() for p in params]
    for i in range(4):
        for j in range(i):
            assert 0.2 < (seen[i] != seen[j]).float().mean() < 0.6


@KINDS
@pytest.mark.parametrize(
    "options",
    [
        {"master_weights": True, "state_dtype": torch.float32},
        {"state_dtype": torch.float32},
        {"state_dtype": "int8", "master_weights": True},
        {"stochastic_rounding": True, "state_dtype": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["deepcopy", "state_dict", "file"])
def test_checkpoints_survive(kind: type[Optimizer], options: dict[str, Any], way: str) -> None:
    """Masters, wide states, codes and scales keep their dtypes and values."""
    params, optimizer = make(kind, torch.bfloat16, lr=0.01, **options)
    train(params, optimizer, 2)
    if way == "deepcopy":
        other = copy.deepcopy(optimizer)
        others = other.param_groups[0]["params"]
    else:
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = kind(others, lr=0.5, **options)
        saved: Any = copy.deepcopy(optimizer.state_dict())
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file)
        other.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        for name, value in optimizer.state[p].items():
            assert other.state[q][name].dtype == value.dtype
            assert torch.equal(other.state[q][name], value)
    train(params, optimizer, 2, seed=9)
    train(others, other, 2, seed=9)
    assert all(map(torch.equal, params, others))


@KINDS
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
def test_torchs_state_is_taken_over_and_given_back(kind: type[Optimizer], state_dtype: Any) -> None:
    """From torch's state to the storage that is asked for, and from there to plain states."""
    if kind not in TORCH_TWIN:
        pytest.skip("torch has no such optimizer")
    params, theirs = make(TORCH_TWIN[kind], torch.bfloat16, lr=0.01)
    train(params, theirs, 2)
    _, mine = make(kind, torch.bfloat16, lr=0.01)
    mine.load_state_dict(theirs.state_dict())
    for group in mine.param_groups:
        group["state_dtype"], group["master_weights"] = state_dtype, True
    own = mine.param_groups[0]["params"]
    train(own, mine, 1)
    for p in own:
        assert mine.state[p]["master_param"].dtype == torch.float32
    for group in mine.param_groups:
        del group["state_dtype"], group["master_weights"]
    train(own, mine, 1)
    for p, q in zip(own, params, strict=True):
        assert list(mine.state[p]) == list(theirs.state[q])
        assert all(v.dtype == theirs.state[q][k].dtype for k, v in mine.state[p].items())


def test_options_left_at_their_defaults_leave_no_trace() -> None:
    _, optimizer = make(effkern.FusedAdam, torch.float32)
    named = {"master_weights", "state_dtype", "stochastic_rounding", "max_grad_norm"}
    assert not named & set(optimizer.param_groups[0])
    _, asked = make(effkern.FusedAdam, torch.float32, state_dtype="int8")
    assert asked.state_dict()["param_groups"][0]["state_dtype"] == "int8"


def test_float32_parameters_have_no_master() -> None:
    twins = Twins([torch.randn(5)], effkern.FusedAdamW)
    for group in twins.optimizer.param_groups:
        group["master_weights"] = group["stochastic_rounding"] = True
    twins.step()
    assert list(twins.optimizer.state[twins.mine[0]]) == ["step", "exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
def test_what_has_no_narrower_state(dtype: torch.dtype, state_dtype: Any) -> None:
    param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = effkern.FusedAdam([param], state_dtype=state_dtype)
    with pytest.raises(RuntimeError, match="state_dtype"):
        optimizer.step()
    assert not param.any()


@pytest.mark.parametrize("wrong", [torch.float16, "int4", 8])
def test_an_unknown_state_dtype(wrong: Any) -> None:
    with pytest.raises(ValueError, match="state_dtype must be None"):
        effkern.FusedAdam([torch.zeros(1)], state_dtype=wrong)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("state_dtype", [torch.float32, "int8"], ids=str)
def test_layouts(backend: Backend, layout: str, state_dtype: Any) -> None:
    """The state lies like its parameter; one that is not dense is copied for the step."""
    base = torch.randn(40, 30, device=backend.device).bfloat16()
    param = torch.nn.Parameter(base.t() if layout == "transposed" else base[::2, ::3])
    plain = torch.nn.Parameter(param.detach().clone().contiguous())
    options = {"lr": 0.01, "state_dtype": state_dtype, "master_weights": True}
    made = [effkern.FusedAdamW([p], **options) for p in (param, plain)]
    for _ in range(2):
        grad = torch.randn(param.shape, device=backend.device).bfloat16()
        for p, optimizer in zip((param, plain), made, strict=True):
            p.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(param, plain, rtol=2e-2, atol=1e-2)
