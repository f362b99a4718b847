"""What a step keeps between calls is given up when a tensor was moved or replaced.

Each change stands between two steps and is done to the twin as well; the steps must go on agreeing.
A step that used an old address would write to memory that nobody reads, or worse.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import effkern
from tests.support.backends import Backend
from tests.support.twins import Twins


def _params(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _states(optimizer: Optimizer) -> list[dict[str, torch.Tensor]]:
    return [optimizer.state[p] for p in _params(optimizer)]


def param_data_swapped(optimizer: Optimizer) -> None:
    for p in _params(optimizer):
        p.data = p.data + 1


def param_data_transposed_in_place(optimizer: Optimizer) -> None:
    p = _params(optimizer)[0]
    p.data = p.data.t()


def param_data_reordered_in_place(optimizer: Optimizer) -> None:
    """From one order that is not contiguous to another, at the same address."""
    p = _params(optimizer)[2]
    p.data = p.data.transpose(1, 2)


def param_storage_resized(optimizer: Optimizer) -> None:
    """Frees the memory and takes it again, as sharded training does."""
    for p in _params(optimizer):
        values, storage = p.detach().clone(), p.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        keep.append(torch.empty(size, dtype=torch.uint8))
        storage.resize_(size)
        with torch.no_grad():
            p.copy_(values)


keep: list[torch.Tensor] = []


def param_swapped(optimizer: Optimizer) -> None:
    """Another tensor in the place of the parameter, its state going with it."""
    group = optimizer.param_groups[0]
    old = group["params"][1]
    group["params"][1] = torch.nn.Parameter(old.detach() * 2)
    optimizer.state[group["params"][1]] = optimizer.state.pop(old)


def param_removed(optimizer: Optimizer) -> None:
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop(1))


def params_exchanged(optimizer: Optimizer) -> None:
    params = optimizer.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]


def group_added(optimizer: Optimizer) -> None:
    p = _params(optimizer)[0]
    extra = torch.nn.Parameter(torch.ones(7, dtype=p.dtype, device=p.device))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})


def param_moved_to_another_group(optimizer: Optimizer) -> None:
    group_added(optimizer)
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def state_entry_replaced(optimizer: Optimizer) -> None:
    for state in _states(optimizer):
        state["exp_avg"] = torch.ones_like(state["exp_avg"])


def state_entry_replaced_by_its_like(optimizer: Optimizer) -> None:
    """Equal values in new memory, one element each."""
    for state in _states(optimizer):
        state["step"] = state["step"].clone()
        state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def state_data_swapped(optimizer: Optimizer) -> None:
    for state in _states(optimizer):
        state["exp_avg_sq"].data = state["exp_avg_sq"].data * 4


def step_data_swapped(optimizer: Optimizer) -> None:
    for state in _states(optimizer):
        state["step"].data = state["step"].data + 5


def state_shared_among_processes(optimizer: Optimizer) -> None:
    for state in _states(optimizer):
        for value in state.values():
            value.share_memory_()


def one_state_cleared(optimizer: Optimizer) -> None:
    optimizer.state[_params(optimizer)[1]] = {}


def one_state_emptied(optimizer: Optimizer) -> None:
    optimizer.state[_params(optimizer)[1]].clear()


def all_states_cleared(optimizer: Optimizer) -> None:
    optimizer.state.clear()


def state_dict_loaded(optimizer: Optimizer) -> None:
    state = optimizer.state_dict()
    for one in state["state"].values():
        one["exp_avg"] = one["exp_avg"] * 3
    optimizer.load_state_dict(state)


def state_loaded_then_param_moved(optimizer: Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    param_data_swapped(optimizer)


def states_exchanged(optimizer: Optimizer) -> None:
    """Between two parameters of one shape."""
    first, _, _, last = _params(optimizer)
    optimizer.state[first], optimizer.state[last] = optimizer.state[last], optimizer.state[first]


def options_changed(optimizer: Optimizer) -> None:
    optimizer.param_groups[0].update(lr=0.3, betas=(0.5, 0.6), weight_decay=0.0, maximize=True)


CHANGES = [
    param_data_swapped,
    param_data_transposed_in_place,
    param_data_reordered_in_place,
    param_storage_resized,
    param_swapped,
    param_removed,
    params_exchanged,
    group_added,
    param_moved_to_another_group,
    state_entry_replaced,
    state_entry_replaced_by_its_like,
    state_data_swapped,
    step_data_swapped,
    state_shared_among_processes,
    one_state_cleared,
    one_state_emptied,
    all_states_cleared,
    state_dict_loaded,
    state_loaded_then_param_moved,
    states_exchanged,
    options_changed,
]


def make_twins(device: str = "cpu", **options: Any) -> Twins:
    shapes = [torch.randn(6, 6), torch.randn(()), torch.randn(3, 3, 2).permute(2, 0, 1)]
    params = [t.to(device) for t in (*shapes, torch.randn(6, 6))]
    return Twins(params, **options)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("keeps_grads", [False, True])
def test_the_next_step_sees_it(
    backend: Backend, change: Callable[[Optimizer], None], keeps_grads: bool
) -> None:
    if backend.device == "cuda" and change in (param_storage_resized, state_shared_among_processes):
        pytest.skip("for tensors on the CPU")
    twins = make_twins(backend.device, lr=0.1)
    twins.step()
    twins.step()
    twins.both(change)
    twins.check()
    if keeps_grads and all(p.grad is not None for p in twins.mine):
        twins.both(lambda optimizer: optimizer.step())
        twins.check()
    for _ in range(2):
        twins.step()


def test_parameters_come_and_go(backend: Backend) -> None:
    """Gradients that are None at some steps: no update, no count; first ones late."""
    twins = make_twins(backend.device)
    for which in ([0], [0, 1], [2], [], [0, 1, 2, 3], [1], [0, 1, 2, 3]):
        twins.step(which)
    steps = [state["step"].item() for state in twins.optimizer.state.values()]
    assert sorted(steps) == [2, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_follows_a_parameter_to_another_dtype(backend: Backend, dtype: torch.dtype) -> None:
    """`module.to(dtype)` after the first step: as if the state had been saved and loaded."""
    twins = make_twins(backend.device, eps=1e-3)
    twins.step()
    twins.started_in = torch.float32
    for p in twins.mine:
        p.data, p.grad = p.data.to(dtype), None
    twins.step()
    assert {t.dtype for p in twins.mine for t in twins.optimizer.state[p].values()} == {
        dtype,
        torch.float32,
    }
    assert all(twins.optimizer.state[p]["exp_avg"].dtype == dtype for p in twins.mine)
    twins.step()


def test_state_follows_a_parameter_to_another_order_of_memory(backend: Backend) -> None:
    twins = Twins([torch.randn(2, 3, 4, 4, device=backend.device)])
    twins.step()
    for optimizer in (twins.optimizer, twins.twin):
        (p,) = _params(optimizer)
        p.data = p.data.to(memory_format=torch.channels_last)
    twins.step()
    (p,) = twins.mine
    assert p.is_contiguous(memory_format=torch.channels_last)
    twins.step()


def test_amsgrad_switched_on(backend: Backend) -> None:
    """PyTorch fails here; we start from a maximum of zero."""
    twins = make_twins(backend.device)
    twins.step()
    twins.optimizer.param_groups[0]["amsgrad"] = True
    twins.twin.param_groups[0]["amsgrad"] = True
    for p in twins.theirs:
        twins.twin.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
    twins.step()
    twins.both(lambda optimizer: optimizer.param_groups[0].update(amsgrad=False))
    twins.step()


def test_the_backend_is_chosen_at_each_step() -> None:
    twins = make_twins()
    for name in (None, "reference", None, "reference"):
        with effkern.use_backend(name):
            twins.step()


def test_a_gradient_that_fits_a_reshaped_parameter(backend: Backend) -> None:
    """The same memory under another shape."""
    twins = Twins([torch.randn(4, 6, device=backend.device)])
    twins.step()
    for optimizer in (twins.optimizer, twins.twin):
        (p,) = _params(optimizer)
        state = optimizer.state[p]
        p.data, p.grad = p.data.view(3, 8), None
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].data = state[name].data.view(3, 8)
    twins.step()
    twins.step()


def test_memory_goes_with_the_optimizer() -> None:
    """At once, not at the next garbage collection."""
    params = [torch.nn.Parameter(torch.randn(5))]
    optimizer = effkern.FusedAdamW(params)
    params[0].grad = torch.ones(5)
    optimizer.step()
    state = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    gc.disable()
    try:
        del optimizer
        assert state() is None
    finally:
        gc.enable()


def test_old_state_goes_before_new_state_is_made() -> None:
    params = [torch.nn.Parameter(torch.randn(5))]
    optimizer = effkern.FusedAdamW(params)
    params[0].grad = torch.ones(5)
    optimizer.step()
    old = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert old() is None


def test_a_module_converted_by_swapping(backend: Backend) -> None:
    """`Module.to` may swap a parameter's insides, where nobody but its owner holds them."""
    if backend.device != "cpu":
        pytest.skip("one device says it all")

    def train(kind: type[Optimizer]) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = kind(model.parameters(), lr=0.1)
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            for state in optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = state[name].to(dtype)
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
                optimizer.step()
        return model.weight.detach()

    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        torch.testing.assert_close(train(effkern.FusedAdam), train(torch.optim.Adam))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
