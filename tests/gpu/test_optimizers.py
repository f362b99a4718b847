"""Steps on a GPU: graphs, launches, streams, no waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import effkern
from tests.optim.test_every_rule import KINDS, WITH_FLAGS, with_all_flags
from tests.support.twins import Twins

SHAPES: tuple[tuple[int, ...], ...] = ((40, 30), (), (3000,), (0, 2))

#: A step after the sums of squares that it needs.
TWO_LAUNCHES = (effkern.FusedLAMB,)


def some_params(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype, device="cuda") for s in SHAPES]


class InPlace:
    """Twins whose gradients stay where they are, as a graph needs them."""

    def __init__(self, kind: type[Optimizer], **options: Any) -> None:
        only_mine = {"capturable": options.pop("capturable", False)}
        clips = options.pop("max_grad_norm", None)
        # In float64, so that no value of thousands is off by more than rounding explains.
        self.twins = Twins(some_params(torch.float64), kind, **options)
        for group in self.twins.optimizer.param_groups:
            group.update(only_mine)
        self.max_grad_norm = clips
        if clips is not None:
            self.twins.optimizer.max_grad_norm = clips  # type: ignore[attr-defined]
        self.grads = [torch.zeros_like(p) for p in self.twins.mine]

    def new_grads(self) -> None:
        self.twins.new_grads()
        for kept, p in zip(self.grads, self.twins.mine, strict=True):
            assert p.grad is not None
            p.grad = kept.copy_(p.grad)

    def step_of_twin(self) -> None:
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.twins.theirs, self.max_grad_norm)
        self.twins.twin.step()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def warmed_up(run: InPlace) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run.new_grads()
            run.twins.optimizer.step()
            run.step_of_twin()
    torch.cuda.current_stream().wait_stream(stream)
    run.twins.check()


def replayed(run: InPlace) -> None:
    """Capture a step, replay it with other gradients, and compare."""
    warmed_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.twins.optimizer.step()
    for _ in range(3):
        run.new_grads()
        graph.replay()
        run.step_of_twin()
        run.twins.check()


@WITH_FLAGS
def test_a_captured_step_is_replayed(
    gpu_backend: str, kind: type[Optimizer], flags: dict[str, Any]
) -> None:
    replayed(InPlace(kind, **{"lr": 0.01, **flags}, capturable=True))


@KINDS
def test_a_captured_step_with_clipping(gpu_backend: str, kind: type[Optimizer]) -> None:
    replayed(InPlace(kind, **with_all_flags(kind), capturable=True, max_grad_norm=0.5))


@KINDS
def test_a_captured_step_reads_the_learning_rate_from_its_tensor(
    gpu_backend: str, kind: type[Optimizer]
) -> None:
    run = InPlace(kind, **with_all_flags(kind), capturable=True)
    lr = torch.tensor(0.05, dtype=torch.float64, device="cuda")
    for group in run.twins.optimizer.param_groups:
        group["lr"] = lr
    warmed_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.twins.optimizer.step()
    for value in (0.25, 0.01):
        lr.fill_(value)
        run.twins.twin.param_groups[0]["lr"] = value
        run.new_grads()
        graph.replay()
        run.step_of_twin()
        run.twins.check()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@KINDS
def test_a_step_does_not_wait_for_the_device(
    gpu_backend: str,
    kind: type[Optimizer],
    capturable: bool,
    scaled: bool,
    max_grad_norm: float | None,
) -> None:
    """Nor do steps whose gradients are new tensors each time."""
    run = InPlace(kind, **with_all_flags(kind), capturable=capturable, max_grad_norm=max_grad_norm)
    optimizer: Any = run.twins.optimizer
    if scaled:
        optimizer.grad_scale = torch.full((), 1.0, device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
    for step in range(4):
        run.twins.new_grads()
        if step < 2:
            optimizer.step()  # makes states, compiles, loads modules
        else:
            with no_waiting():
                optimizer.step()
        run.step_of_twin()
    run.twins.check()


def kernels_of(step: Any) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name for e in on_device if not e.name.startswith(("Mem", "Optimizer"))]


@KINDS
def test_one_launch_for_any_number_of_tensors(gpu_backend: str, kind: type[Optimizer]) -> None:
    params = [torch.nn.Parameter(torch.randn(1 + i % 7, device="cuda")) for i in range(300)]
    optimizer = kind(params, lr=0.01)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p in params:
        p.grad = torch.randn_like(p)
    torch.cuda.synchronize()
    kernels = kernels_of(optimizer.step)
    assert len(kernels) == (2 if kind in TWO_LAUNCHES else 1), kernels


@KINDS
def test_two_launches_with_clipping(gpu_backend: str, kind: type[Optimizer]) -> None:
    params = [torch.nn.Parameter(torch.randn(1 + i % 7, device="cuda")) for i in range(300)]
    optimizer = kind(params, lr=0.01, max_grad_norm=0.5)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        torch.cuda.synchronize()
        kernels = kernels_of(optimizer.step)
    assert len(kernels) == (3 if kind in TWO_LAUNCHES else 2), kernels


@KINDS
def test_the_current_stream(gpu_backend: str, kind: type[Optimizer]) -> None:
    """Gradients that a side stream is still computing are waited for by the step on it."""
    run = InPlace(kind, **with_all_flags(kind))
    warmed_up(run)
    stream = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    run.twins.new_grads()
    new = [p.grad for p in run.twins.mine]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy / 64
        for kept, p, grad in zip(run.grads, run.twins.mine, new, strict=True):
            assert grad is not None
            p.grad = kept.copy_(grad)
        run.twins.optimizer.step()
    stream.synchronize()
    run.step_of_twin()
    run.twins.check()


@KINDS
def test_a_grad_scaler(gpu_backend: str, kind: type[Optimizer]) -> None:
    twins = Twins(some_params(), kind, **with_all_flags(kind))
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
    scaler.scale(torch.ones((), device="cuda"))  # makes its scale
    for i in range(4):
        twins.new_grads()
        for p in twins.mine:
            assert p.grad is not None
            p.grad = p.grad * 64.0
        if i == 3:
            assert twins.mine[2].grad is not None
            twins.mine[2].grad[7] = float("inf")
        scaler.step(twins.optimizer)
        scaler.update()
        if i != 3:
            twins.twin.step()
        twins.check()
    assert scaler.get_scale() == 32.0


@pytest.mark.parametrize("kind", [effkern.FusedAdamW, effkern.FusedSGD])
def test_more_elements_than_32_bits_count(gpu_backend: str, kind: type[Optimizer]) -> None:
    many = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 12 * many:
        pytest.skip("needs memory for four tensors of 2^31 bfloat16 elements")
    param = torch.nn.Parameter(torch.ones(many, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones_like(param)
    kind([param], lr=0.5).step()
    for place in (0, 2**31 - 1, 2**31, many - 1):
        assert param[place].item() == pytest.approx(0.5, abs=0.01), place
    assert (param != param[0]).sum().item() == 0


@KINDS
def test_a_compiled_step_is_the_eager_one(gpu_backend: str, kind: type[Optimizer]) -> None:
    torch._dynamo.reset()
    twins = Twins(some_params(), kind, **with_all_flags(kind))
    step = torch.compile(twins.optimizer.step, fullgraph=True)
    for _ in range(3):
        twins.new_grads()
        step()
        twins.twin.step()
        twins.check()
