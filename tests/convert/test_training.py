"""The training form: gradients and steps of the Pre-LN original."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from effkern.convert import NotConvertible, inference_form, to_rmsnorm, training_form
from tests.convert import nets
from tests.convert.nets import Block, Net, randomised


class DropoutBlock(Block):
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().branch(x), 0.3, self.training)


class Attention(Block):
    """Reads the weights of a child's linear itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.attention(y, y, y, need_weights=False)[0]


class AddsQuery(nn.Module):
    def __init__(self, query: nn.Parameter) -> None:
        super().__init__()
        self.query = query

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.query


class Passed(Block):
    """Passes a parameter of its own to its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(16))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return super().branch(x) * self.up(self.norm(self.query))[:1].sigmoid()


class ReadTwice(Passed):
    """Reads it too, once a child that reads it has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.adds = AddsQuery(self.query)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.adds(x) + self.query)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "tied": lambda: Net(tied=True),
    "LayerScale": lambda: Net(nets.ScaledBlock(), Block()),
    "functional norm": lambda: Net(nets.FunctionalBlock(), Block()),
    "attention": lambda: Net(Attention(), Block()),
    "parameter passed on": lambda: Net(Passed(), Block()),
    "parameter read twice": lambda: Net(ReadTwice(), Block()),
    "dropout": lambda: Net(DropoutBlock(), nets.FunctionalBlock()),
    "patches": nets.Patches,
}


def train(model: nn.Module, inputs: tuple[torch.Tensor, ...], steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(*inputs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


SLOW = ("tied", "functional norm", "patches")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODELS]
)
def test_trains_as_the_original(name: str) -> None:
    inputs = nets.image() if name == "patches" else nets.tokens()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    original = randomised(MODELS[name]()).double()
    model = to_rmsnorm(copy.deepcopy(original), inputs).model
    objects = list(model.parameters())
    assert training_form(model) is model
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    for (key, a), (same, b) in zip(
        original.named_parameters(), model.named_parameters(), strict=True
    ):
        assert key == same
        torch.testing.assert_close(b, a, rtol=0, atol=1e-14)

    before, after = train(original, inputs), train(model, inputs)
    assert before[-1] < 0.9 * before[0]
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=1e-9, atol=0)
    for a, b in zip(original.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-9)

    original.eval(), model.eval()
    for form in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nets.assert_same(nets.call(original, inputs), nets.call(form, inputs), ["output"], 1e-9)
    assert not any("weight" in vars(module) for module in model.modules())
    inference_form(model)
    nets.assert_same(nets.call(original, inputs), nets.call(model, inputs), ["output"], 1e-9)
    assert nets.layer_norms(model, inputs) == 0
    training_form(training_form(model))
    for a, b in zip(original.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)


def test_without_dropout_it_centres_and_runs_rms_norm() -> None:
    """Else equal training would show nothing: the form could be the original itself."""
    model = training_form(to_rmsnorm(randomised(Net()), nets.tokens()).model).train()
    seen = []
    model.blocks[0].down.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    model(*nets.tokens())
    assert seen[0].mean(0).abs().max() < 1e-7
    assert model.blocks[0].down.weight.mean(0).abs().max() > 1e-3
    graph = torch.export.export(model, nets.tokens(), strict=False).graph
    assert "layer_norm" not in str(graph)


def test_a_failing_call_leaves_the_parameters_to_be_seen() -> None:
    model = training_form(to_rmsnorm(randomised(Net()), nets.tokens()).model)
    down = model.blocks[0].down
    with pytest.raises(RuntimeError):
        down(torch.zeros(2, 3))
    assert down.weight is down._parameters["weight"]


def test_a_model_that_was_not_converted() -> None:
    for function in (training_form, inference_form):
        with pytest.raises(NotConvertible, match="was not converted"):
            function(Net())
