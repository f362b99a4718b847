"""State: torch's layout, checkpoints in both directions, copies and pickles."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import effkern
from tests.support.twins import ADAMS, TORCH_TWIN, Twins

KINDS = pytest.mark.parametrize("kind", ADAMS, ids=lambda k: k.__name__)
AMSGRAD = pytest.mark.parametrize("amsgrad", [False, True])


def make_params() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5, 1, 40)]


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def checkpoint(optimizer: torch.optim.Optimizer) -> Any:
    """The state_dict after a way through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@KINDS
@AMSGRAD
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_state_dict_has_torchs_layout(
    kind: type[effkern.FusedAdam], amsgrad: bool, default: torch.dtype
) -> None:
    def layout(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, layout(one)) for key, one in value.items()]
        if isinstance(value, (list, tuple)):
            return [layout(one) for one in value]
        if isinstance(value, torch.Tensor):
            return (value.dtype, value.shape, value.stride(), value.device, value.requires_grad)
        return value

    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = []
        for made in (kind, TORCH_TWIN[kind]):
            params = [*make_params(), torch.nn.Parameter(torch.randn(3, 4).t())]
            named = [(f"p{i}", p) for i, p in enumerate(params)]
            optimizer = made(named, amsgrad=amsgrad)
            fresh = layout(optimizer.state_dict())
            train(optimizer, 1)
            found.append((fresh, layout(optimizer.state_dict())))
    finally:
        torch.set_default_dtype(before)
    assert found[0] == found[1]


@KINDS
@AMSGRAD
@pytest.mark.parametrize("fused", [False, True], ids=["torch for-loop", "torch fused"])
@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_a_training_goes_on_in_the_other_class(
    kind: type[effkern.FusedAdam], amsgrad: bool, fused: bool, direction: str
) -> None:
    """Checkpoint, load into the other class, and the next steps are those of the first class."""
    theirs = TORCH_TWIN[kind]

    def made(by_torch: bool) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"fused": True} if fused else {"foreach": False}
        options.update(lr=0.1, weight_decay=0.1, amsgrad=amsgrad)
        return theirs(make_params(), **options) if by_torch else kind(make_params(), **options)

    first = made(by_torch=direction == "from torch")
    train(first, 3)
    second = made(by_torch=direction == "to torch")
    for mine, other in zip(
        second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True
    ):
        mine.data.copy_(other.data)
    second.load_state_dict(checkpoint(first))
    for optimizer in (first, second):
        train(optimizer, 3, seed=2)
    for a, b in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for name in first.state[b]:
            torch.testing.assert_close(
                second.state[a][name], first.state[b][name], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]).half()], ids=repr)
def test_step_counters_of_older_states(step: Any) -> None:
    """PyTorch once kept a number; others keep integers or narrow floats."""
    optimizer = effkern.FusedAdamW(make_params(), lr=0.1)
    other = effkern.FusedAdamW(make_params(), lr=0.1)
    train(optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for one in state["state"].values():
        one["step"] = step
    for mine, p in zip(
        other.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True
    ):
        mine.data.copy_(p.data)
    other.load_state_dict(state)
    if not isinstance(step, torch.Tensor):
        assert all(torch.is_tensor(one["step"]) for one in other.state.values())
    for one in (optimizer, other):
        train(one, 1, seed=2)
    for mine, p in zip(
        other.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(mine, p)
        assert other.state[mine]["step"].item() == 4


def test_groups_of_older_states_get_the_options_they_lack() -> None:
    old = torch.optim.Adam(make_params())
    train(old, 1)
    state = old.state_dict()
    for name in ("amsgrad", "maximize", "decoupled_weight_decay", "foreach", "fused"):
        del state["param_groups"][0][name]
    optimizer = effkern.FusedAdam(make_params())
    optimizer.load_state_dict(state)
    train(optimizer, 1)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is False


def test_adamw_stays_adamw_whatever_is_loaded() -> None:
    for kind in (torch.optim.AdamW, effkern.FusedAdamW):
        optimizer = kind(make_params())
        optimizer.load_state_dict(torch.optim.Adam(make_params()).state_dict())
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


def test_a_state_from_a_capturable_training_loads() -> None:
    optimizer = effkern.FusedAdamW(make_params())
    state = torch.optim.AdamW(make_params(), capturable=True).state_dict()
    optimizer.load_state_dict(state)
    train(optimizer, 1)


@KINDS
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_alike(kind: type[effkern.FusedAdam], way: str) -> None:
    optimizer = kind(make_params(), lr=0.1, amsgrad=True)
    train(optimizer, 2)
    if way == "deepcopy":
        other = copy.deepcopy(optimizer)
    else:
        other = pickle.loads(pickle.dumps(optimizer))
    mine, theirs = (o.param_groups[0]["params"] for o in (optimizer, other))
    before = [p.clone() for p in mine]
    train(other, 2, seed=2)
    assert all(map(torch.equal, mine, before))
    train(optimizer, 2, seed=2)
    assert all(map(torch.equal, mine, theirs))


def test_state_made_in_inference_mode_can_be_written_outside() -> None:
    twins = Twins([torch.randn(5)])
    twins.new_grads()
    with torch.inference_mode():
        twins.optimizer.step()
    twins.twin.step()
    twins.check()
    twins.step()


def test_parameters_made_in_inference_mode() -> None:
    """They have no version counters, and PyTorch lets them be written inside that mode."""
    with torch.inference_mode():
        param = torch.randn(5)
        theirs = param.double()
        optimizer = effkern.FusedAdamW([param.requires_grad_(False)], lr=0.1)
        twin = torch.optim.AdamW([theirs], lr=0.1)
        for _ in range(2):
            param.grad = torch.randn(5)
            theirs.grad = param.grad.double()
            optimizer.step()
            twin.step()
        torch.testing.assert_close(param.double(), theirs, rtol=1e-5, atol=1e-6)


def test_no_state_before_the_first_gradient() -> None:
    params = make_params()
    optimizer = effkern.FusedAdamW(params)
    optimizer.step()
    params[1].grad = torch.ones(1)
    optimizer.step()
    assert list(optimizer.state) == [params[1]]
    assert list(optimizer.state[params[1]]) == ["step", "exp_avg", "exp_avg_sq"]


def test_no_half_made_state_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.nn.Parameter(torch.randn(n)) for n in (20000, 3, 30000, 40000)]
    optimizer = effkern.FusedAdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    resize, calls = torch.Tensor.resize_, []

    def runs_out(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        calls.append(shape)
        if len(calls) == 5:
            raise MemoryError
        return resize(tensor, shape)

    monkeypatch.setattr(torch.Tensor, "resize_", runs_out)
    with pytest.raises(MemoryError):
        optimizer.step()
    monkeypatch.undo()
    assert not any(optimizer.state.values())
    optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in params)


def test_states_of_small_parameters_share_a_buffer_and_copies_do_without() -> None:
    """Version counters rise where a buffer's views share one, and where they no longer do."""
    params = make_params()
    optimizer = effkern.FusedAdamW(params)
    train(optimizer, 1)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert len({optimizer.state[p][name].untyped_storage().data_ptr() for p in params}) == 1
    begins = [optimizer.state[p]["exp_avg"].data_ptr() for p in params]
    assert not any((begin - begins[0]) % 64 for begin in begins)
    loaded = effkern.FusedAdamW(make_params())
    loaded.load_state_dict(checkpoint(optimizer))
    for one in (optimizer, copy.deepcopy(optimizer), loaded):
        states = [t for state in one.state.values() for t in state.values()]
        before = [t._version for t in states]
        train(one, 1)
        assert all(t._version > v for t, v in zip(states, before, strict=True))


def test_a_checkpoint_is_no_larger_than_torchs() -> None:
    sizes = []
    for kind in (effkern.FusedAdamW, torch.optim.AdamW):
        params = [torch.nn.Parameter(torch.randn(n)) for n in (1000, 40000, 64)]
        optimizer = kind(params)
        train(optimizer, 1)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes.append(len(file.getvalue()))
    assert sizes[0] <= sizes[1]


def apex_state(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Any:
    """A state as Apex's FusedAdam saves it: one step count, in the group."""
    state = copy.deepcopy(optimizer.state_dict())
    (group,) = state["param_groups"]
    kept = ("lr", "betas", "eps", "weight_decay", "params")
    state["param_groups"] = [{**{k: group[k] for k in kept}, "bias_correction": True, "step": 3}]
    for one in state["state"].values():
        assert one.pop("step").item() == 3
    return state


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_state_of_apex_loads(as_tensor: bool) -> None:
    params = make_params()
    theirs = torch.optim.AdamW(params, lr=0.1)
    train(theirs, 3)
    state = apex_state(params, theirs)
    if as_tensor:
        state["param_groups"][0]["step"] = torch.tensor([3], dtype=torch.int32)
    mine = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = effkern.FusedAdam(mine, lr=0.5, adam_w_mode=True)
    optimizer.load_state_dict(state)
    assert "step" not in optimizer.param_groups[0]
    for one in (theirs, optimizer):
        train(one, 2, seed=5)
    for a, b in zip(mine, params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert optimizer.state[a]["step"].item() == 5


@KINDS
def test_apexs_options(kind: type[effkern.FusedAdam]) -> None:
    params = make_params()
    options = {"bias_correction": False, "set_grad_none": False, "weight_decay": 0.0}
    optimizer = kind(params, lr=0.1, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    # m = 0.1, v = 0.001, as they are.
    for p, before in zip(params, make_params(), strict=True):
        torch.testing.assert_close(before - p, torch.full_like(p, 0.1 * 0.1 / 0.001**0.5))
    other = copy.deepcopy(optimizer)
    optimizer.zero_grad()
    assert all(p.grad is not None and not p.grad.any() for p in params)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.zero_grad()
    assert all(p.grad is not None for p in other.param_groups[0]["params"])
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in params)
