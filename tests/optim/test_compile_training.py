"""Whole training steps under torch.compile: cut at backward as by default, and in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import Optimizer

import effkern
from tests.optim.test_compile import BACKEND
from tests.optim.test_compile_options import same, variants

Step = Callable[[Tensor], Tensor]
in_one_graph = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this PyTorch traces no backward",
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Linear(torch.nn.Linear):
    """A layer of another dtype than its input and output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).float()


def train(
    kind: type[Optimizer],
    options: dict[str, Any],
    step_of: Callable[[Step], Step] = lambda step: step,
    of_group: tuple[dict[str, Any], ...] = ({}, {}),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Four steps of a small model, each at another learning rate.

    Args:
        kind: the optimizer's class.
        options: its arguments.
        step_of: turns the function of a step into what is run.
        of_group: for each layer what its group says.
        dtype: of the layers.

    Returns:
        The losses, then what became of the parameters.
    """
    torch.manual_seed(0)
    layers = [Linear(6, 6) for _ in of_group]
    model = torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.Tanh()))).to(
        dtype
    )
    groups = [{"params": list(m.parameters()), **g} for m, g in zip(layers, of_group, strict=True)]
    optimizer = kind(groups, **options)

    def step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        for p in model.parameters():  # Dynamo traces no zero_grad
            p.grad = None
        return loss.detach()

    run = step_of(step)
    losses = []
    for i in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + i)
        losses.append(run(torch.randn(4, 6)))
    return [*losses, *(p.detach() for p in model.parameters())]


def all_same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(same, found, expected)) and len(found) == len(expected)


@variants
def test_the_default_compile_equals_eager(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """Dynamo breaks the graph at the call of backward."""
    graphs = CompileCounterWithBackend(BACKEND)
    found = train(kind, options, lambda step: torch.compile(step, backend=graphs))
    assert all_same(found, train(kind, options))
    assert graphs.frame_count == 2  # forward, and the step


def test_it_trains_as_torch_does() -> None:
    found, expected = (train(kind, {}) for kind in (effkern.FusedAdamW, torch.optim.AdamW))
    torch.testing.assert_close(found, expected)


def whole(graphs: CompileCounterWithBackend, eager_steps: int = 0) -> Callable[[Step], Step]:
    def step_of(step: Step) -> Step:
        compiled = torch.compile(step, fullgraph=True, backend=graphs)
        steps = iter([step] * eager_steps)
        return lambda x: next(steps, compiled)(x)

    return step_of


@in_one_graph
@variants
def test_in_one_graph(kind: type[Optimizer], options: dict[str, Any]) -> None:
    graphs = CompileCounterWithBackend(BACKEND)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = train(kind, options, whole(graphs))
    assert all_same(found, train(kind, options))
    assert graphs.frame_count == 1


@in_one_graph
def test_a_parameter_replaced_between_steps() -> None:
    def trained(step_of: Callable[[Step], Step]) -> Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3)
        optimizer = effkern.FusedAdam(model.parameters())

        def step(x: Tensor) -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            model.weight.grad = model.bias.grad = None
            return loss.detach()

        run = step_of(step)
        run(torch.ones(3))
        model.weight = torch.nn.Parameter(torch.ones(3, 3))
        optimizer.param_groups[0]["params"][0] = model.weight
        run(torch.ones(3))
        return model.weight.detach()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = trained(whole(CompileCounterWithBackend(BACKEND)))
    assert torch.equal(found, trained(lambda step: step))


@in_one_graph
@pytest.mark.parametrize("eager_steps", [0, 1])
def test_in_one_graph_with_clipping_and_every_way_of_storing(eager_steps: int) -> None:
    ways = (
        {},
        {"state_dtype": torch.float32},
        {"state_dtype": "int8"},
        {"master_weights": True},
        {"stochastic_rounding": True},
    )
    options = {"max_grad_norm": 0.01}
    graphs = CompileCounterWithBackend(BACKEND)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = train(effkern.FusedAdam, options, whole(graphs, eager_steps), ways, torch.bfloat16)
    assert all_same(found, train(effkern.FusedAdam, options, of_group=ways, dtype=torch.bfloat16))
    assert graphs.frame_count == 1
