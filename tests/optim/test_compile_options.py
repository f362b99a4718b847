"""Compiled steps with every option: in one graph, and bit for bit those of an eager optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import Optimizer

import effkern
from tests.optim.test_compile import BACKEND
from tests.support.backends import Backend

#: Options that reach every state a rule may keep.
VARIANTS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (effkern.FusedAdam, {"amsgrad": True}),
    (effkern.FusedAdamW, {"capturable": True}),
    (effkern.FusedSGD, {}),
    (effkern.FusedSGD, {"momentum": 0.9, "dampening": 0.3}),
    (effkern.FusedAdagrad, {}),
    (effkern.FusedRMSprop, {"centered": True, "momentum": 0.9}),
    (effkern.FusedAdadelta, {}),
    (effkern.FusedLion, {"weight_decay": 0.1}),
    (effkern.FusedLAMB, {"weight_decay": 0.1}),
]
variants = pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=str)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def some(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(30, 10).to(dtype), torch.randn(4, 6).to(dtype).t()]


def stored_in_every_way() -> list[dict[str, Any]]:
    everything = {"stochastic_rounding": True, "state_dtype": "int8", "master_weights": True}
    return [
        {"params": [*some(), torch.randn(()), torch.randn(0), torch.randn(4, 6)[:, ::2]]},
        {"params": some(torch.bfloat16), "state_dtype": torch.float32, "lr": 0.02},
        {"params": some(), "state_dtype": torch.bfloat16, "maximize": True},
        {"params": [*some(), torch.randn(3).bfloat16()], "state_dtype": "int8"},
        {"params": [torch.randn(5).half(), *some(torch.bfloat16)], "master_weights": True},
        {"params": some(torch.bfloat16), "stochastic_rounding": True},
        {"params": [torch.randn(9).bfloat16()], **everything},
        {"params": [torch.randn(3, dtype=d) for d in (torch.complex64, torch.float64)]},
    ]


class Pair:
    """The same optimizer twice: one steps eagerly, the other compiled, in one graph.

    Args:
        make: makes parameters or groups, of random numbers.
        kind: effkern's class.
        options: of both.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        kind: type[Optimizer],
        backend: str = BACKEND,
        **options: Any,
    ) -> None:
        made = []
        for _ in range(2):
            torch.manual_seed(1)
            groups = [g if isinstance(g, dict) else {"params": [g]} for g in make()]
            for group in groups:
                group["params"] = [torch.nn.Parameter(p) for p in group["params"]]
            made.append(kind(groups, **copy.deepcopy(options)))
        self.eager, self.optimizer = made
        self.graphs = CompileCounterWithBackend(backend)
        self.compile()

    def compile(self) -> None:
        self.run = torch.compile(self.optimizer.step, fullgraph=True, backend=self.graphs)

    def params(self) -> Iterator[tuple[Tensor, Tensor]]:
        for of_eager, of_compiled in zip(
            self.eager.param_groups, self.optimizer.param_groups, strict=True
        ):
            yield from zip(of_eager["params"], of_compiled["params"], strict=True)

    def both(self, change: Callable[[Any], Any]) -> None:
        change(self.eager)
        change(self.optimizer)

    def new_grads(self, without: Sequence[int] = ()) -> None:
        for i, (a, b) in enumerate(self.params()):
            a.grad = None if i in without else torch.randn_like(a)
            b.grad = None if a.grad is None else a.grad.clone()

    def step(self, without: Sequence[int] = ()) -> None:
        self.new_grads(without)
        self.eager.step()
        self.run()
        self.check()

    def check(self) -> None:
        for i, (a, b) in enumerate(self.params()):
            assert same(a, b), f"parameter {i}"
            kept, found = (o.state.get(p, {}) for o, p in ((self.eager, a), (self.optimizer, b)))
            assert list(kept) == list(found)
            for key, value in kept.items():
                # Dynamo takes step counters to the parameters' device.
                mine = found[key].to(value.device) if key == "step" else found[key]
                assert same(value, mine), f"{key} of parameter {i}"
        if self.eager.max_grad_norm is not None:  # type: ignore[attr-defined]
            assert same(self.eager.last_grad_norm, self.optimizer.last_grad_norm)  # type: ignore[attr-defined]


def same(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@variants
def test_every_way_of_storing_with_clipping(kind: type[Optimizer], options: dict[str, Any]) -> None:
    pair = Pair(stored_in_every_way, kind, lr=0.01, max_grad_norm=0.5, **options)
    for _ in range(3):
        pair.step()
        pair.both(lambda o: [g.update(lr=0.5 * g["lr"]) for g in o.param_groups])
    assert pair.graphs.frame_count == 1


def test_with_inductor() -> None:
    """Plain parameters are in test_compile.py."""

    def groups() -> list[dict[str, Any]]:
        narrow = {"params": some(torch.bfloat16), "state_dtype": "int8", "master_weights": True}
        return [narrow, {"params": [torch.randn(3, dtype=torch.complex64)]}]

    pair = Pair(groups, effkern.FusedAdam, "inductor", lr=0.01, max_grad_norm=0.5)
    for _ in range(2):
        pair.step()


def test_on_every_backend(backend: Backend) -> None:
    def groups() -> list[dict[str, Any]]:
        narrow = torch.randn(5, 3, device=backend.device).bfloat16()
        return [
            {"params": [torch.randn(7, device=backend.device)]},
            {"params": [narrow], "master_weights": True, "state_dtype": "int8"},
        ]

    pair = Pair(groups, effkern.FusedAdam, lr=0.01, max_grad_norm=0.5)
    for _ in range(2):
        pair.step()
    assert pair.graphs.frame_count == 1


# ---- what changes between steps ----


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("kind", [effkern.FusedAdamW, effkern.FusedSGD])
def test_a_scheduler_does_not_compile_anew(kind: type[Optimizer]) -> None:
    """The rate and, with it, the momentum change at every step."""
    own = {"momentum": 0.9} if kind is effkern.FusedSGD else {}
    pair = Pair(some, kind, lr=0.01, **own)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20)
        for o in (pair.eager, pair.optimizer)
    ]
    pair.compile()
    rates = set()
    for i in range(12):
        with torch._dynamo.config.patch(error_on_recompile=i > 0 and kind is effkern.FusedAdamW):
            pair.step()
        rates.add(pair.optimizer.param_groups[0]["lr"])
        for scheduler in schedulers:
            scheduler.step()
    assert len(rates) == 12
    assert pair.graphs.frame_count <= 3


def test_a_scheduler_warns_where_no_step_was_taken() -> None:
    optimizer = effkern.FusedAdamW([torch.zeros(3)])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    assert "step" not in vars(optimizer)  # not wrapped: Dynamo would not trace it


def test_a_tensor_takes_the_place_of_a_float() -> None:
    pair = Pair(some, effkern.FusedAdamW, lr=0.01)
    for lr in (0.1, torch.tensor(0.2), 0.3, torch.tensor([0.4], dtype=torch.float64)):
        pair.both(lambda o, lr=lr: o.param_groups[0].update(lr=lr))
        pair.step()


def test_other_hyperparameters_are_read_at_each_step() -> None:
    pair = Pair(some, effkern.FusedAdamW)
    for i in range(4):
        new = {"betas": (0.5, 0.6 + 0.1 * i), "eps": 0.1**i, "maximize": i == 2}
        pair.both(lambda o, new=new: o.param_groups[0].update(new))
        pair.step()
    assert pair.graphs.frame_count == 1


def test_the_norm_that_is_clipped_to_may_change() -> None:
    pair = Pair(some, effkern.FusedAdamW, lr=0.01)
    for max_norm in (None, 0.5, 1e9, None, 0.1):
        pair.both(lambda o, norm=max_norm: setattr(o, "max_grad_norm", norm))
        pair.step()


def loaded(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def of_other_values(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value + 1


def in_other_memory(optimizer: Any) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.clone() * 2


def replaced(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    params[0] = torch.nn.Parameter(torch.ones_like(params[0]))


def exchanged(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "state loaded": loaded,
    "state of other values": of_other_values,
    "state cleared": lambda o: o.state.clear(),
    "state of one cleared": lambda o: o.state.pop(o.param_groups[0]["params"][0]),
    "parameters in other memory": in_other_memory,
    "a parameter replaced": replaced,
    "parameters exchanged": exchanged,
    "a group added": lambda o: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]}),
    "a group removed": lambda o: o.param_groups.pop(),
    "amsgrad": lambda o: o.param_groups[0].update(amsgrad=True),
    "int8": lambda o: o.param_groups[0].update(state_dtype="int8"),
    "a step without compiling": lambda o: o.step(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps(change: str) -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": [torch.randn(5), torch.randn(5)]}, {"params": [torch.randn(2)]}]

    pair = Pair(groups, effkern.FusedAdam, lr=0.01)
    for _ in range(2):
        pair.step()
    pair.both(CHANGES[change])
    for _ in range(2):
        pair.step()


def test_parameters_without_gradients() -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": some()}, {"params": some(torch.bfloat16), "master_weights": True}]

    pair = Pair(groups, effkern.FusedSGD, momentum=0.9, max_grad_norm=0.5)
    for without in ([0], [1, 2, 3], [0, 1, 2, 3], []):
        pair.step(without)  # the norm of none is 0


def test_parameters_that_share_memory_are_updated_one_after_another() -> None:
    def views() -> list[Tensor]:
        whole = torch.randn(12)
        return [whole[:8], whole[4:], torch.randn(3)]

    pair = Pair(views, effkern.FusedSGD, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        pair.step()


def test_gradients_that_are_views_of_conjugates() -> None:
    pair = Pair(lambda: [torch.randn(3, dtype=torch.complex64), torch.randn(3)], effkern.FusedAdam)
    grads = torch.randn(2, 3, dtype=torch.complex64).conj()
    for a, b in pair.params():
        for one in (a, b):
            one.grad = grads[0] if a.is_complex() else grads[1].imag
    pair.eager.step()
    pair.run()
    pair.check()


# ---- around a step ----


def test_under_a_grad_scaler() -> None:
    pair = Pair(some, effkern.FusedAdam, lr=0.01, max_grad_norm=0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1) for _ in range(2)]
    pair.optimizer.step = pair.run  # type: ignore[method-assign]
    norms = []
    for inf in (False, True, False):
        pair.new_grads()
        for a, b in pair.params():
            for one, scaler in zip((a, b), scalers, strict=True):
                one.grad *= scaler.scale(torch.ones(()))
                if inf:
                    one.grad[0] = float("inf")
        for optimizer, scaler in zip((pair.eager, pair.optimizer), scalers, strict=True):
            scaler.step(optimizer)
            scaler.update()
        pair.check()
        norms.append(pair.optimizer.last_grad_norm)
    right = torch.nn.utils.get_total_norm([a.grad for a, _ in pair.params()]) / 8.0
    torch.testing.assert_close(norms[-1], right)
    assert pair.graphs.frame_count == 1
    assert pair.optimizer.state[next(pair.params())[1]]["step"] == 2


def test_hooks_and_a_closure() -> None:
    pair = Pair(some, effkern.FusedSGD, lr=0.1)
    run = torch.compile(pair.optimizer.step, backend=BACKEND)
    for optimizer in (pair.eager, pair.optimizer):
        optimizer.register_step_pre_hook(
            lambda o, *_: o.param_groups[0].update(lr=0.5 * o.param_groups[0]["lr"])
        )

    def closure(which: int) -> Callable[[], Tensor]:
        params = [pair_of[which] for pair_of in pair.params()]

        def evaluate() -> Tensor:
            for p in params:
                p.grad = None
            loss = torch.stack([p.square().sum() for p in params]).sum()
            loss.backward()
            return loss

        return evaluate

    for _ in range(2):
        assert torch.equal(pair.eager.step(closure(0)), run(closure(1)))
        pair.check()


def test_a_group_that_the_graph_itself_has_changed() -> None:
    pair = Pair(some, effkern.FusedSGD, lr=0.1)

    def step() -> None:
        pair.optimizer.param_groups[0]["lr"] = 0.5
        pair.optimizer.step()

    pair.new_grads()
    with pytest.raises(Exception, match="changes a parameter group before the step"):
        torch.compile(step, fullgraph=True, backend=BACKEND)()
    pair.optimizer.param_groups[0]["lr"] = 0.1
    torch.compile(step, backend=BACKEND)()
    pair.eager.param_groups[0]["lr"] = 0.5
    pair.eager.step()
    pair.check()


def test_clipping_cannot_be_changed_by_the_graph() -> None:
    pair = Pair(some, effkern.FusedSGD, lr=0.1)

    def step() -> None:
        pair.optimizer.max_grad_norm = 0.5  # type: ignore[attr-defined]
        pair.optimizer.step()

    pair.new_grads()
    with pytest.raises(RuntimeError, match="max_grad_norm cannot be changed inside a compiled"):
        torch.compile(step, backend=BACKEND)()


def test_two_steps_in_one_graph() -> None:
    pair = Pair(some, effkern.FusedAdam, lr=0.1, max_grad_norm=0.5)
    pair.new_grads()

    def twice(optimizer: Optimizer) -> None:
        optimizer.step()
        optimizer.step()

    twice(pair.eager)
    torch.compile(twice, fullgraph=True, backend=BACKEND)(pair.optimizer)
    pair.check()


def test_a_copy_of_an_optimizer_reads_its_own_groups() -> None:
    pair = Pair(some, effkern.FusedSGD, lr=0.1)
    pair.step()
    pair.optimizer = copy.deepcopy(pair.optimizer)
    pair.optimizer.param_groups[0]["lr"] = pair.eager.param_groups[0]["lr"] = 0.5
    pair.compile()
    pair.step()
