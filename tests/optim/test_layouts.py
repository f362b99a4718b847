"""Parameters and gradients of every layout that memory allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.backends import Backend
from tests.support.twins import Twins

SHAPE = (2, 3, 4, 5)

PARAMS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(SHAPE),
    "channels_last": lambda: torch.randn(SHAPE).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(SHAPE).transpose(0, 2),
    "permuted": lambda: torch.randn(SHAPE).permute(3, 1, 0, 2),
    "sliced": lambda: torch.randn(4, 6, 4, 5)[::2, ::2],
    "a column": lambda: torch.randn(7, 3)[:, 1],
    "reversed rows of a transpose": lambda: torch.randn(5, 8).t()[1:, ::2],
    "one long dimension": lambda: torch.randn(6, 1, 1).transpose(0, 2),
    "empty": lambda: torch.randn(3, 0, 2).transpose(0, 2),
    "a number": lambda: torch.randn(()),
}

GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "as the parameter": lambda p: torch.empty_like(p).copy_(torch.randn(p.shape)),
    "contiguous": lambda p: torch.randn(p.shape, device=p.device),
    "transposed": lambda p: torch.randn(p.shape[::-1], device=p.device).permute(
        tuple(range(p.dim() - 1, -1, -1))
    ),
    "expanded": lambda p: torch.randn((), device=p.device).expand(p.shape),
    "sliced": lambda p: torch.randn((*p.shape, 2), device=p.device)[..., 0],
    "negated in memory": lambda p: (
        torch.randn(p.shape, dtype=torch.complex64, device=p.device).conj().imag
    ),
    "zeros without memory": lambda p: torch._efficientzerotensor(p.shape, device=p.device),
    "at an odd offset": lambda p: torch.randn(p.numel() + 1, device=p.device)[1:].view(p.shape),
}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("layout", PARAMS)
def test_layouts_of_parameters(backend: Backend, layout: str, amsgrad: bool) -> None:
    params = [make().to(backend.device) for make in (PARAMS[layout], PARAMS["contiguous"])]
    twins = Twins(params, amsgrad=amsgrad)
    for _ in range(2):
        twins.step()


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout", PARAMS)
def test_layouts_of_gradients(backend: Backend, layout: str, grad: str) -> None:
    params = [make().to(backend.device) for make in (PARAMS["contiguous"], PARAMS[layout])]
    twins = Twins(params)
    for _ in range(2):
        twins.new_grads()
        twins.mine[1].grad = GRADS[grad](twins.mine[1].detach())
        twins.theirs[1].grad = twins.mine[1].grad.double().cpu()
        kept = [p.grad.clone() for p in twins.mine]
        twins.both(lambda optimizer: optimizer.step())
        twins.check()
        assert all(map(torch.equal, (p.grad for p in twins.mine), kept))


def test_a_mix_of_everything(backend: Backend) -> None:
    twins = Twins([make().to(backend.device) for make in PARAMS.values()])
    for _ in range(2):
        twins.step()


def test_parameters_that_interleave(backend: Backend) -> None:
    """Columns of one matrix: what lies between one's elements is another's."""
    base = torch.randn(6, 3, device=backend.device)
    twins = Twins([base[:, 0], base[:, 1], base[:, 2]])
    for _ in range(2):
        twins.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_is_updated_twice(backend: Backend) -> None:
    param = torch.nn.Parameter(torch.randn(9, device=backend.device))
    theirs = torch.nn.Parameter(param.detach().double().cpu())
    twins = Twins([torch.randn(1)])
    twins.optimizer = type(twins.optimizer)([param, param], lr=0.1)
    twins.twin = torch.optim.AdamW([theirs, theirs], lr=0.1, foreach=False)
    for _ in range(3):
        twins.step()
    assert twins.optimizer.state[param]["step"].item() == 6


def test_parameters_on_the_same_memory_are_updated_one_after_another(backend: Backend) -> None:
    twins = Twins([torch.randn(12, device=backend.device), torch.randn(12, device=backend.device)])
    for params in (twins.mine, twins.theirs):
        params[1].data = params[0].data
    for _ in range(2):
        twins.step()


def test_an_expanded_parameter_is_refused(backend: Backend) -> None:
    expanded = torch.nn.Parameter(torch.randn(1, device=backend.device).expand(5))
    plain = torch.nn.Parameter(torch.randn(5, device=backend.device))
    twins = Twins([torch.randn(1)])
    optimizer = type(twins.optimizer)([plain, expanded])
    before = plain.detach().clone()
    plain.grad, expanded.grad = torch.ones_like(plain), torch.ones_like(plain)
    with pytest.raises(RuntimeError, match="parameter 1 of its group must have memory of its own"):
        optimizer.step()
    assert torch.equal(plain, before)
    assert not optimizer.state
