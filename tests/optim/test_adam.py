"""FusedAdam and FusedAdamW stand in for torch's classes in every way that a training uses them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import effkern
from effkern.backends import native
from tests.support.backends import Backend
from tests.support.twins import ADAMS, TORCH_TWIN, Twins

KINDS = pytest.mark.parametrize("kind", ADAMS, ids=lambda k: k.__name__)


def some_params(device: str = "cpu") -> list[torch.Tensor]:
    return [torch.randn(shape, device=device) for shape in ((4, 3), (), (17,))]


@KINDS
def test_it_takes_what_torchs_class_takes(kind: type[effkern.FusedAdam]) -> None:
    """Every argument under its name, in its place, with its default."""
    theirs = inspect.signature(TORCH_TWIN[kind]).parameters
    mine = inspect.signature(kind).parameters
    assert {n: p.default for n, p in theirs.items()}.items() <= {
        n: p.default for n, p in mine.items()
    }.items()
    ordered = [n for n, p in theirs.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in mine.items() if p.kind == p.POSITIONAL_OR_KEYWORD] == ordered
    assert issubclass(kind, torch.optim.Optimizer)


@KINDS
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_training_of_a_small_model_follows_torchs(
    kind: type[effkern.FusedAdam], amsgrad: bool, maximize: bool
) -> None:
    """Twenty steps of a perceptron, gradients by autograd."""

    def train(made: Any) -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
        optimizer = made(model.parameters(), lr=1e-2, amsgrad=amsgrad, maximize=maximize)
        losses = []
        for _ in range(20):
            x = torch.randn(16, 8)
            loss = (model(x) - x[:, :2].sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, [p.detach() for p in model.parameters()]

    losses, params = train(kind)
    their_losses, their_params = train(TORCH_TWIN[kind])
    torch.testing.assert_close(losses, their_losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(params, their_params, rtol=1e-4, atol=1e-5)
    assert (losses[-1] > losses[0]) == maximize


@KINDS
def test_groups_with_options_of_their_own(backend: Backend, kind: type[effkern.FusedAdam]) -> None:
    a, b, c = some_params(backend.device)
    twins = Twins(
        [
            {"params": [a], "lr": 0.1, "weight_decay": 0.0},
            {"params": [b], "amsgrad": True, "betas": (0.5, 0.8)},
            {"params": [c], "maximize": True, "eps": 0.1},
        ],
        kind,
        lr=0.02,
        weight_decay=0.3,
    )
    for _ in range(3):
        twins.step()
    for mine, theirs in zip(twins.mine, twins.theirs, strict=True):
        assert list(twins.optimizer.state[mine]) == list(twins.twin.state[theirs])


def test_dtypes_in_one_group(backend: Backend) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16)
    twins = Twins([torch.randn(9, device=backend.device).to(dtype) for dtype in dtypes], eps=1e-3)
    for _ in range(2):
        twins.step()


def test_groups_without_any_gradient(backend: Backend) -> None:
    """None at all, and some groups with none."""
    a, b, c = some_params(backend.device)
    twins = Twins([{"params": [a]}, {"params": [b, c]}])
    twins.optimizer.step()
    assert not twins.optimizer.state
    twins.step(which=[2])
    twins.step(which=[0])
    twins.step()


def test_adding_a_group_in_the_middle(backend: Backend) -> None:
    twins = Twins(some_params(backend.device))
    twins.step()
    added = torch.randn(6)
    for optimizer, param in (
        (twins.optimizer, added.to(backend.device)),
        (twins.twin, added.double()),
    ):
        optimizer.add_param_group({"params": torch.nn.Parameter(param), "lr": 0.3})
    for _ in range(2):
        twins.step()


def test_freezing_and_unfreezing(backend: Backend) -> None:
    """As users do it: requires_grad_ off and on, with zero_grad between."""
    torch.manual_seed(1)
    twins = Twins(some_params(backend.device), lr=0.1)

    def one_step(frozen: int | None) -> None:
        for params in (twins.mine, twins.theirs):
            for i, p in enumerate(params):
                p.requires_grad_(i != frozen)
            sum((p * p).sum() for p in params).backward()
        twins.both(lambda optimizer: optimizer.step())
        twins.both(lambda optimizer: optimizer.zero_grad())
        twins.check()

    for frozen in (0, 0, None, 2, None):
        one_step(frozen)


def test_zero_grad_may_keep_the_gradients(backend: Backend) -> None:
    twins = Twins(some_params(backend.device))
    for _ in range(3):
        twins.both(lambda optimizer: optimizer.zero_grad(set_to_none=False))
        for params in (twins.mine, twins.theirs):
            sum((p * p).sum() for p in params).backward()
        twins.both(lambda optimizer: optimizer.step())
        twins.check()


def test_closures() -> None:
    twins = Twins(some_params())
    losses = []
    for optimizer, params in ((twins.optimizer, twins.mine), (twins.twin, twins.theirs)):

        def closure(optimizer: Any = optimizer, params: Any = params) -> torch.Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((p * p).sum() for p in params)
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append(optimizer.step(closure))
    twins.check()
    torch.testing.assert_close(losses[0].double(), losses[1])
    assert twins.optimizer.step() is None


def test_step_hooks() -> None:
    optimizer = effkern.FusedAdamW([torch.nn.Parameter(torch.zeros(3))])
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(3)
    seen: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", param[0].item())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", param[0].item())))
    optimizer.step()
    assert [name for name, _ in seen] == ["before", "after"]
    assert seen[0][1] == 0.0
    assert seen[1][1] != 0.0


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: lr_scheduler.StepLR(o, 1, 0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    ],
    ids=["step", "cosine", "one cycle with momentum"],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers(scheduler: Any, as_tensor: bool) -> None:
    # A tensor of float64, so that the scheduler's arithmetic is the twin's.
    lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    twins = Twins(some_params(), lr=0.1)
    twins.optimizer = effkern.FusedAdamW(twins.mine, lr=lr)
    mine, theirs = scheduler(twins.optimizer), scheduler(twins.twin)
    for _ in range(4):
        twins.step()
        mine.step()
        theirs.step()


def test_tensors_as_betas_and_learning_rate(backend: Backend) -> None:
    twins = Twins(some_params(backend.device), lr=0.25, betas=(0.5, 0.75))
    twins.optimizer = effkern.FusedAdamW(
        twins.mine,
        lr=torch.tensor(0.25, device=backend.device),
        betas=(torch.tensor(0.5), torch.tensor(0.75)),
    )
    twins.step()
    twins.optimizer.param_groups[0]["lr"].fill_(0.5)
    twins.twin.param_groups[0]["lr"] = 0.5
    twins.step()


def test_grad_scaler_works_unchanged() -> None:
    """Scaled gradients, and a step that is skipped for an infinity."""
    twins = Twins(some_params(), lr=0.1)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for i in range(3):
        twins.new_grads()
        if i == 1:
            twins.mine[0].grad[0, 0] = twins.theirs[0].grad[0, 0] = float("inf")
        pairs = zip(scalers, (twins.optimizer, twins.twin), strict=True)
        for (scaler, optimizer), params in zip(pairs, (twins.mine, twins.theirs), strict=True):
            scaler.scale(torch.zeros(()))
            for p in params:
                p.grad *= scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
        twins.check()
    assert [s.get_scale() for s in scalers] == [512.0, 512.0]
    assert twins.optimizer.state[twins.mine[0]]["step"].item() == 2


def test_version_counters_rise_and_gradients_stay(backend: Backend) -> None:
    params = [torch.nn.Parameter(p) for p in some_params(backend.device)]
    optimizer = effkern.FusedAdam(params, amsgrad=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        kept = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        watched = [*params, *(t for s in optimizer.state.values() for t in s.values())]
        before = [t._version for t in watched]
        optimizer.step()
        assert all(t._version > was for t, was in zip(watched, before, strict=True))
        for p, (grad, value, version) in zip(params, kept, strict=True):
            assert p.grad is grad
            assert grad._version == version
            assert torch.equal(grad, value)


def test_a_graph_through_an_updated_parameter_is_refused() -> None:
    """What version counters are for: autograd notices the update."""
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = effkern.FusedAdamW([weight])
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_one_parameter_used_twice_in_a_model() -> None:
    def train(made: Any) -> torch.Tensor:
        torch.manual_seed(0)
        embedding, head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False)
        head.weight = embedding.weight
        model = torch.nn.Sequential(embedding, head)
        optimizer = made(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(9)).square().mean().backward()
            optimizer.step()
        assert len(optimizer.state) == 1
        return head.weight.detach()

    torch.testing.assert_close(train(effkern.FusedAdamW), train(torch.optim.AdamW))


def test_subclasses_of_parameter() -> None:
    class Mine(torch.nn.Parameter):
        pass

    twins = Twins([torch.randn(4), Mine(torch.randn(5))])
    assert type(twins.mine[1]) is Mine
    for _ in range(2):
        twins.step()


def test_a_default_device_does_not_matter() -> None:
    twins = Twins(some_params())
    twins.new_grads()
    with torch.device("meta"):
        twins.both(lambda optimizer: optimizer.step())
    twins.check()


def test_on_the_reference_backend() -> None:
    twins = Twins(some_params())
    with effkern.use_backend("reference"):
        twins.step()
        twins.step()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_on_every_instruction_set(isa: str) -> None:
    before = native.cpu_isa()
    if before is None or not native.set_cpu_isa(isa):
        pytest.skip(f"no {isa} on this machine, or no CPU library")
    try:
        twins = Twins(some_params())
        twins.step()
    finally:
        native.set_cpu_isa(before)


def test_apexs_name_of_decoupled_decay() -> None:
    for adam_w_mode in (False, True):
        optimizer = effkern.FusedAdam([torch.zeros(1)], adam_w_mode=adam_w_mode)
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is adam_w_mode
    optimizer = effkern.FusedAdam([torch.zeros(1)], decoupled_weight_decay=True)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


def test_tensors_for_numbers_are_taken_as_torch_takes_them() -> None:
    one = torch.tensor(0.9)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"lr": one, "foreach": True}, "lr as a Tensor is not supported for capturable=False"),
        (
            {"betas": (one, one), "foreach": True},
            r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
        ),
        ({"betas": (0.9, one)}, "betas must be either both floats or both Tensors"),
        ({"betas": (one, 0.9)}, "betas must be either both floats or both Tensors"),
    ]
    for kind in ADAMS:
        for options, message in refused:
            for made in (kind, TORCH_TWIN[kind]):
                with pytest.raises(ValueError, match=message):
                    made([torch.zeros(1)], **options)
        with pytest.raises(ValueError, match=r"Tensor betas\[1\] must be 1-element"):
            kind([torch.zeros(1)], betas=(one, torch.ones(2)))
        for capturable in (False, True):
            kind([torch.zeros(1)], lr=one, betas=(one, one[None]), capturable=capturable)
        kind([torch.zeros(1)], lr=one, betas=(one, one), capturable=True, foreach=True)


def test_foreach_and_fused_are_accepted() -> None:
    twins = Twins(some_params())
    twins.optimizer = effkern.FusedAdamW(twins.mine, foreach=True, fused=True)
    twins.step()
