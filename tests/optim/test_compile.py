"""Steps under torch.compile: in one graph, and equal to eager ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import effkern
from tests.support.twins import Twins

#: aot_eager runs everything of torch.compile but Inductor's code generation.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """Twins of which effkern's takes its steps compiled, each in one graph."""

    def __init__(self, twins: Twins, backend: str = BACKEND) -> None:
        self.twins = twins
        self.graphs = CompileCounterWithBackend(backend)
        self._step = torch.compile(twins.optimizer.step, fullgraph=True, backend=self.graphs)

    def step(self, which: list[int] | None = None) -> None:
        self.twins.new_grads(which)
        self._step()
        self.twins.twin.step()
        self.twins.check()


def shapes() -> list[Tensor]:
    return [torch.randn(4, 3), torch.randn(()), torch.randn(9), torch.randn(0)]


def of_every_layout() -> list[Tensor]:
    return [
        torch.randn(4, 6).t(),
        torch.randn(4, 6)[:, ::2],
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(1, 5).t(),
    ]


def of_every_dtype() -> list[Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    return [torch.randn(5).to(dtype) for dtype in dtypes]


def in_groups() -> list[dict[str, Any]]:
    return [
        {"params": [torch.randn(4)], "lr": 0.3, "weight_decay": 0.0},
        {"params": [torch.randn(4), torch.randn(2, 2)], "maximize": True},
        {"params": [torch.randn(3)], "amsgrad": True},
    ]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("params", [shapes, of_every_layout, of_every_dtype, in_groups])
def test_equal_to_eager(params: Callable[[], Any], steps_before: int) -> None:
    twins = Twins(params(), lr=0.1, eps=1e-3)
    for _ in range(steps_before):
        twins.step()
    compiled = Compiled(twins)
    for _ in range(3):
        compiled.step()
    assert compiled.graphs.frame_count == 1


@pytest.mark.parametrize(
    ("kind", "amsgrad"), [(effkern.FusedAdam, False), (effkern.FusedAdamW, True)]
)
def test_with_inductor(kind: type[effkern.FusedAdam], amsgrad: bool) -> None:
    compiled = Compiled(Twins(shapes(), kind, amsgrad=amsgrad, weight_decay=0.1), "inductor")
    for _ in range(3):
        compiled.step()


def test_states_made_eagerly_with_inductor() -> None:
    """They are cut from one buffer, as are the parameters; inductor before PyTorch 2.13 loses its
    way in such ones.
    """
    params = list(torch.randn(375).split([5, 300, 70]))
    twins = Twins(params, effkern.FusedAdagrad, lr=0.1)
    twins.step()
    step = torch.compile(twins.optimizer.step, fullgraph=True)
    for _ in range(3):
        twins.new_grads()
        step()
        twins.twin.step()
        twins.check()
    states = [v for s in twins.optimizer.state.values() for v in s.values()]
    assert not any(value.storage_offset() for value in states)


def test_eager_and_compiled_steps_take_turns() -> None:
    twins = Twins(shapes())
    compiled = Compiled(twins)
    for _ in range(2):
        twins.step()
        compiled.step()
    assert compiled.graphs.frame_count == 1


def test_a_float_learning_rate_may_change() -> None:
    twins = Twins(shapes())
    compiled = Compiled(twins)
    for lr in (0.1, 0.2, 0.3, 0.1):
        twins.both(lambda optimizer, lr=lr: optimizer.param_groups[0].update(lr=lr))
        compiled.step()
    assert compiled.graphs.frame_count == 1


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_learning_rate_is_an_input_of_the_graph(shape: tuple[int, ...]) -> None:
    twins = Twins(shapes(), lr=0.1)
    twins.optimizer = effkern.FusedAdamW(twins.mine, lr=torch.full(shape, 0.1))
    compiled = Compiled(twins)
    for lr in (0.5, 0.25, 0.125, 1.0):
        twins.optimizer.param_groups[0]["lr"].fill_(lr)
        twins.twin.param_groups[0]["lr"] = lr
        compiled.step()
    assert compiled.graphs.frame_count == 1


def test_gradients_come_and_go() -> None:
    compiled = Compiled(Twins(shapes()[:3]))
    for which in ([0], [0, 1, 2], [1]):
        compiled.step(which)


def test_gradients_that_lie_otherwise() -> None:
    twins = Twins([torch.randn(4, 3)])
    compiled = Compiled(twins)
    twins.new_grads()
    twins.mine[0].grad = torch.randn(3, 4).t()
    twins.theirs[0].grad = twins.mine[0].grad.double()
    compiled._step()
    twins.twin.step()
    twins.check()


def test_the_choice_of_a_backend_is_guarded_on() -> None:
    compiled = Compiled(Twins(shapes()))
    compiled.step()
    with effkern.use_backend("reference"):
        compiled.step()
        compiled.step()
    compiled.step()
    assert compiled.graphs.frame_count == 2


def test_version_counters_rise() -> None:
    twins = Twins([torch.randn(5), torch.randn(5)])
    compiled = Compiled(twins)
    compiled.step()
    watched = [*twins.mine, *(t for s in twins.optimizer.state.values() for t in s.values())]
    before = [t._version for t in watched]
    compiled.step()
    assert all(t._version > was for t, was in zip(watched, before, strict=True))


def test_what_is_refused_eagerly_is_refused_compiled() -> None:
    optimizer = effkern.FusedAdamW([torch.nn.Parameter(torch.randn(3))])
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(Exception, match="does not support sparse gradients"):
        torch.compile(optimizer.step, fullgraph=True, backend=BACKEND)()
    assert not optimizer.state


#: Options that reach every state a rule may keep.
EVERY_RULE: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (effkern.FusedSGD, {}),
    (effkern.FusedSGD, {"momentum": 0.9, "dampening": 0.3}),
    (effkern.FusedAdagrad, {"eps": 1e-3}),
    (effkern.FusedRMSprop, {"centered": True, "momentum": 0.9, "eps": 1e-2}),
    (effkern.FusedAdadelta, {"eps": 1e-3}),
    (effkern.FusedLion, {"weight_decay": 0.1}),
    (effkern.FusedLAMB, {"weight_decay": 0.1, "eps": 1e-3}),
]


@pytest.mark.parametrize(("kind", "options"), EVERY_RULE, ids=str)
def test_every_rule_after_eager_steps(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    """From the first step on: test_compile_options.py."""
    twins = Twins(shapes(), kind, lr=0.05, **options)
    for _ in range(2):
        twins.step()
    compiled = Compiled(twins)
    for _ in range(3):
        compiled.step()
    assert compiled.graphs.frame_count == 1


@pytest.mark.parametrize(("kind", "options"), EVERY_RULE, ids=str)
def test_every_rule_with_its_learning_rate_in_a_tensor(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    twins = Twins(shapes(), kind, lr=0.05, **options)
    twins.optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    compiled = Compiled(twins)
    for lr in (0.5, 0.25, 0.125):
        twins.optimizer.param_groups[0]["lr"].fill_(lr)
        twins.twin.param_groups[0]["lr"] = lr
        compiled.step()
    assert compiled.graphs.frame_count == 1


def test_complex_parameters() -> None:
    params = [torch.randn(4, dtype=torch.complex64), torch.randn(3, 2, dtype=torch.complex64).t()]
    compiled = Compiled(Twins(params, eps=1e-3))
    for _ in range(3):
        compiled.step()
