"""state_dict and load_state_dict: hooks, entries of others' making, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import effkern
from tests.optim.test_every_rule import FLAGS, KINDS, with_all_flags


def trained(kind: type[Optimizer], **options: Any) -> Optimizer:
    """After two steps of two parameters, of names ``layer.weight`` and ``layer.bias``."""
    params = [Parameter(torch.randn(2, 3)), Parameter(torch.randn(4))]
    named = zip(("layer.weight", "layer.bias"), params, strict=True)
    optimizer = kind(list(named), **options)
    for _ in range(2):
        step(optimizer)
    return optimizer


def step(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()


@KINDS
def test_entries_that_belong_to_no_parameter(kind: type[Optimizer]) -> None:
    """Hooks put them there: torch's keeps them."""
    optimizer = trained(kind)
    optimizer.state["version"] = 3  # type: ignore[index]
    optimizer.state["names"] = ["a"]  # type: ignore[index]
    step(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        step(one)
        assert one.state["version"] == 3  # type: ignore[index, comparison-overlap]
        assert one.state["names"] == ["a"]  # type: ignore[index, comparison-overlap]


@KINDS
def test_a_hook_that_adapts_the_state_of_another_model(kind: type[Optimizer]) -> None:
    """By names, as torch's documentation has it: more parameters, in another order."""
    small = trained(kind, **with_all_flags(kind))
    params = [Parameter(torch.randn(shape)) for shape in ((5,), (4,), (2, 3))]
    names = ["head", "layer.bias", "layer.weight"]
    large = kind(list(zip(names, params, strict=True)), **with_all_flags(kind))

    def adapt(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = state_dict["param_groups"][0]["param_names"]
        states = {
            i: state_dict["state"][saved.index(name)]
            for i, name in enumerate(names)
            if name in saved
        }
        return {"state": states, "param_groups": optimizer.state_dict()["param_groups"]}

    large.register_load_state_dict_pre_hook(adapt)
    large.load_state_dict(small.state_dict())
    weight, bias = small.param_groups[0]["params"]
    for mine, theirs in ((params[1], bias), (params[2], weight)):
        assert mine in large.state
        for key, value in small.state[theirs].items():
            assert torch.equal(large.state[mine][key], value), key
    step(large)


def test_a_hook_that_changes_what_is_loaded_keeps_dtypes() -> None:
    """Of masters, which torch would cast, as the hook's state_dict has them."""
    optimizer = effkern.FusedAdamW(
        [Parameter(torch.randn(3).bfloat16())], master_weights=True, state_dtype=torch.float32
    )
    step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())

    def swapped(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["master_param"].fill_(1 / 3)
        return state_dict

    seen: list[torch.dtype] = []
    optimizer.register_load_state_dict_pre_hook(swapped)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.extend(s["master_param"].dtype for s in o.state.values())
    )
    optimizer.load_state_dict(saved)
    assert seen == [torch.float32]
    (state,) = optimizer.state.values()
    assert torch.equal(state["master_param"], torch.full((3,), 1 / 3))
    assert state["exp_avg"].dtype == torch.float32


def test_a_hook_may_replace_the_state_dict() -> None:
    optimizer = trained(effkern.FusedAdam)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {"all": state_dict})
    assert optimizer.state_dict()["all"]["state"].keys() == {0, 1}
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1


@KINDS
def test_states_take_the_parameters_dtype_at_once(kind: type[Optimizer]) -> None:
    """As in torch, where no option asks for another."""
    saved = trained(kind, **with_all_flags(kind)).state_dict()
    optimizer = kind(
        [Parameter(torch.randn(shape).bfloat16()) for shape in ((2, 3), (4,))],
        **with_all_flags(kind),
    )
    optimizer.load_state_dict(saved)
    dtypes = {k: v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "step"}
    assert set(dtypes.values()) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("way", "state_dtype"),
    [("torch's class", None), *product(("deepcopy", "pickle", "state_dict"), (None, "int8"))],
)
def test_a_copy_after_a_skipped_first_step(way: str, state_dtype: Any) -> None:
    """A GradScaler begins with such steps: the momentum buffer is still to begin as the gradient,
    undampened."""
    options = {"momentum": 0.9, "dampening": 0.5}
    optimizer = effkern.FusedSGD([torch.zeros(3)], state_dtype=state_dtype, **options)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(3)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    optimizer.found_inf = None
    other: Optimizer
    if way == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        kind = effkern.FusedSGD if way == "state_dict" else torch.optim.SGD
        other = kind([torch.zeros(3)], **options)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (other, optimizer):
        (p,) = one.param_groups[0]["params"]
        p.grad = torch.ones(3)
        one.step()
        torch.testing.assert_close(p, torch.full((3,), -1e-3), rtol=1e-2, atol=0.0)


def first_state(state: dict[str, Any]) -> str:
    return next(key for key in state if key != "step")


def of_another_shape(state: dict[str, Any]) -> None:
    state[first_state(state)] = torch.ones(5)


def of_no_tensor(state: dict[str, Any]) -> None:
    state[first_state(state)] = "ones"


def sparse(state: dict[str, Any]) -> None:
    state[first_state(state)] = torch.ones(4).to_sparse()


def two_counters(state: dict[str, Any]) -> None:
    state["step"] = torch.ones(2)


SPOILT: dict[Callable[[dict[str, Any]], None], str] = {
    of_another_shape: r"have shape \(4,\), got \(5,\)",
    of_no_tensor: r"have shape \(4,\), got str",
    sparse: "be a dense tensor, got layout torch.sparse_coo",
    two_counters: r"be one number, got \(2,\)",
}


@KINDS
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
def test_a_state_that_does_not_fit_is_not_loaded(
    kind: type[Optimizer], spoil: Callable[[dict[str, Any]], None]
) -> None:
    """The message names the parameter; not a bit of the optimizer is another then."""
    optimizer = trained(kind, **with_all_flags(kind))
    other = copy.deepcopy(optimizer)
    bad = copy.deepcopy(optimizer.state_dict())
    for value in bad["state"][0].values():
        value.fill_(7.0)
    bad["param_groups"][0]["lr"] = 7.0
    spoil(bad["state"][1])
    message = rf"{kind.__name__}: state '\w+' of parameter 'layer.bias' must {SPOILT[spoil]}"
    with pytest.raises(RuntimeError, match=message):
        optimizer.load_state_dict(bad)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    for one in (optimizer, other):
        torch.manual_seed(1)
        step(one)
    assert_equal(optimizer, other)


def test_a_failing_hook_leaves_the_optimizer_as_it_was() -> None:
    optimizer = trained(effkern.FusedSGD, momentum=0.9)
    other = copy.deepcopy(optimizer)

    def fail(*_: Any) -> None:
        raise KeyError("gone")

    saved = trained(effkern.FusedSGD, momentum=0.9).state_dict()
    for register in ("pre", "post"):
        handle = getattr(optimizer, f"register_load_state_dict_{register}_hook")(fail)
        with pytest.raises(KeyError, match="gone"):
            optimizer.load_state_dict(saved)
        handle.remove()
    assert_equal(optimizer, other)


@pytest.mark.parametrize("missing", [False, True])
def test_codes_need_the_scales_of_their_blocks(missing: bool) -> None:
    """Too few would be read beyond their end."""
    optimizer = effkern.FusedAdam([("w", Parameter(torch.randn(1000)))], state_dtype="int8")
    step(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state = state_dict["state"][0]
    assert state["exp_avg_scales"].shape == (4,)
    if missing:
        del state["exp_avg_scales"]
    else:
        state["exp_avg_scales"] = state["exp_avg_scales"][:3].clone()
    got = "NoneType" if missing else r"\(3,\)"
    message = rf"'exp_avg_scales' of parameter 'w' must have shape \(4,\), got {got}"
    with pytest.raises(RuntimeError, match=message):
        optimizer.load_state_dict(state_dict)
    (own,) = optimizer.state.values()
    own["exp_avg_scales"] = state.get("exp_avg_scales")
    with pytest.raises(RuntimeError, match=message):
        step(optimizer)


@KINDS
def test_another_number_of_groups_or_parameters(kind: type[Optimizer]) -> None:
    """torch's error, and the optimizer goes on."""
    optimizer = trained(kind, **FLAGS[kind][-1])
    for change in (
        lambda groups: groups.append(groups[0]),
        lambda groups: groups[0]["params"].pop(),
    ):
        bad = copy.deepcopy(optimizer.state_dict())
        change(bad["param_groups"])
        with pytest.raises(ValueError, match=r"different number of|doesn't match the size"):
            optimizer.load_state_dict(bad)
    step(optimizer)


def assert_equal(optimizer: Optimizer, other: Optimizer) -> None:
    """Bit for bit: parameters, groups and states."""
    mine, theirs = (o.param_groups[0].pop("params") for o in (optimizer, other))
    assert optimizer.param_groups == other.param_groups
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        assert list(optimizer.state[a]) == list(other.state[b])
        for key, value in optimizer.state[a].items():
            assert isinstance(value, Tensor)
            assert torch.equal(value, other.state[b][key]), key
