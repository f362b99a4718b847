"""The norms of effkern.nn as drop-ins for those of torch.nn; and CRMSNorm, which has none there."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import effkern
from effkern.nn import functional
from tests.support.backends import Backend


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [16, (16,), (4, 4)])
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_same_as_torch(
    backend: Backend, name: str, affine: bool, shape: int | tuple[int, ...]
) -> None:
    make = {"elementwise_affine": affine, "eps": 1e-4, "device": backend.device}
    stock, mine = (getattr(module, name)(shape, **make) for module in (torch.nn, effkern.nn))
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter)
    mine.load_state_dict(stock.state_dict())
    x = torch.randn(3, *([16] if shape != (4, 4) else [4, 4]), device=backend.device)
    torch.testing.assert_close(mine(x), stock(x))


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_parameters_that_were_replaced(name: str) -> None:
    """By functional_call, by a parametrization, and by a plain tensor in their place."""
    norm, x = getattr(effkern.nn, name)(8), torch.randn(3, 8)
    doubled = 2 * norm(x).detach()
    twice = {key: 2 * value for key, value in norm.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(norm, twice, (x,)), doubled)

    class Twice(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    parametrized = copy.deepcopy(norm)
    torch.nn.utils.parametrize.register_parametrization(parametrized, "weight", Twice())
    torch.testing.assert_close(parametrized(x), doubled)
    plain = copy.deepcopy(norm)
    del plain.weight
    plain.weight = 2 * norm.weight.detach()
    torch.testing.assert_close(plain(x), doubled)
    compiled = torch.compile(norm, fullgraph=True)
    torch.testing.assert_close(2 * compiled(x).detach(), doubled)
    with torch.no_grad():
        norm.weight.mul_(2)
    torch.testing.assert_close(compiled(x).detach(), doubled)


def test_layer_norm_without_a_bias() -> None:
    stock, mine = (module.LayerNorm(8, bias=False) for module in (torch.nn, effkern.nn))
    x = torch.randn(3, 8)
    torch.testing.assert_close(mine(x), stock(x))
    assert isinstance(mine, torch.nn.LayerNorm)
    assert repr(mine) == repr(stock)
    assert list(mine.state_dict()) == ["weight"]


def test_crms_norm() -> None:
    norm = effkern.nn.CRMSNorm(8, eps=1e-5, elementwise_affine=True, dtype=torch.float64)
    assert norm.weight.shape == (7,)
    assert list(norm.state_dict()) == ["weight"]
    assert repr(norm) == "CRMSNorm(8, eps=1e-05, elementwise_affine=True)"
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 7, dtype=torch.float64)
    full = torch.cat([x, -x.sum(-1, keepdim=True)], -1)
    expected = torch.nn.functional.rms_norm(full, (8,), eps=1e-5)[:, :-1] * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert effkern.nn.CRMSNorm(8).weight is None
    norm.reset_parameters()
    assert (norm.weight == 1).all()


def test_same_arguments_parameters_and_text() -> None:
    stock = torch.nn.RMSNorm(8, 1e-5, dtype=torch.bfloat16)
    mine = effkern.nn.RMSNorm(8, 1e-5, dtype=torch.bfloat16)
    assert isinstance(mine, torch.nn.RMSNorm)
    assert repr(mine) == repr(stock)
    assert list(mine.state_dict()) == list(stock.state_dict()) == ["weight"]
    assert mine.weight.dtype == torch.bfloat16
    assert (mine.weight == 1).all()
    assert effkern.nn.RMSNorm(8, elementwise_affine=False).weight is None


MODULES = [
    effkern.nn.RMSNorm(8),
    effkern.nn.LayerNorm(8),
    effkern.nn.CRMSNorm(9, elementwise_affine=True),
]
every_module = pytest.mark.parametrize("norm", MODULES, ids=lambda norm: type(norm).__name__)


@every_module
def test_residual(norm: torch.nn.Module) -> None:
    x, r = torch.randn(3, 8), torch.randn(3, 8)
    y, total = norm(x, r)
    assert torch.equal(total, x + r)
    assert torch.equal(y, norm(x + r))


@every_module
def test_copies_and_pickles(norm: torch.nn.Module) -> None:
    norm = copy.deepcopy(norm)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x))


def test_functional_takes_torch_s_arguments() -> None:
    x, w = torch.randn(2, 3, 8), torch.rand(8)
    stock = torch.nn.functional.rms_norm(x, [8], w, 1e-3)
    torch.testing.assert_close(functional.rms_norm(x, [8], w, 1e-3), stock)
    torch.testing.assert_close(functional.rms_norm(x, torch.Size([8]), weight=w, eps=1e-3), stock)


def test_a_small_model_trains_alike() -> None:
    def train(norm: type[torch.nn.Module]) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(12, 24), norm(24), torch.nn.GELU(), torch.nn.Linear(24, 4)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, target = torch.randn(64, 12), torch.randint(4, (64,))
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert train(effkern.nn.RMSNorm) == pytest.approx(train(torch.nn.RMSNorm), rel=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_torch_fx_stops_at_it(grad: bool) -> None:
    """As it does at PyTorch's own layers, where whole models are traced."""
    layers = effkern.nn.LayerNorm(8), effkern.nn.RMSNorm(8)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), *layers)
    x = torch.randn(3, 8)
    with torch.set_grad_enabled(grad):
        traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))
        assert torch.equal(traced(x), model(x))
