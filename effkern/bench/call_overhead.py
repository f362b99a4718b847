"""What a call costs on an input so small that nothing else counts: 1 x 64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from effkern.bench import machine
from effkern.bench.peers import EPS
from effkern.bench.progress import Report, counter, silent
from effkern.bench.results import OURS, Case, Result, make_rows
from effkern.bench.timers import Contestant, alternate, clock_for
from effkern.nn import functional

HIDDEN_SIZE = 64
ROUNDS = 25
WARM_UP = 3

#: Calls under one reading of the clock.
CALLS = 500


def run(device: str = "cpu", *, seed: int = 0, report: Report = silent) -> Result:
    """The call overhead alone, as a result of its own."""
    cases = measure(torch.device(device), seed=seed, report=report)
    settings = {"device": device, "rounds": ROUNDS, "calls": CALLS, "seed": seed}
    return Result("call_overhead", settings, machine.describe(), cases)


def measure(device: torch.device, *, seed: int = 0, report: Report = silent) -> list[Case]:
    """Forward + backward, and forward without gradient, beside torch on the same tensors."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, grad = tensor(1, HIDDEN_SIZE).requires_grad_(), tensor(1, HIDDEN_SIZE)
    weight, bias = tensor(HIDDEN_SIZE).requires_grad_(), tensor(HIDDEN_SIZE).requires_grad_()
    shape = weight.shape
    norms: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        OURS: (lambda: functional.rms_norm(x, shape, weight, EPS), (x, weight)),
        "torch layer_norm": (lambda: F.layer_norm(x, shape, weight, None, EPS), (x, weight)),
        "torch layer_norm, bias": (
            lambda: F.layer_norm(x, shape, weight, bias, EPS),
            (x, weight, bias),
        ),
        "torch rms_norm": (lambda: F.rms_norm(x, shape, weight, EPS), (x, weight)),
    }

    def without_gradient(norm: Callable[[], Tensor]) -> Contestant:
        return Contestant(lambda _: norm())

    def with_backward(norm: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Contestant:
        return Contestant(lambda _: torch.autograd.grad(norm(), inputs, grad))

    def case(mode: str, contestants: dict[str, Contestant]) -> Case:
        name = f"call overhead, RMSNorm 1 x {HIDDEN_SIZE}, {mode}"
        times = alternate(
            contestants,
            rounds=ROUNDS,
            warm_up=WARM_UP,
            calls=CALLS,
            clock=clock_for(device),
            on_round=counter(report, name, WARM_UP + ROUNDS),
        )
        return Case(name, make_rows(times), of_overhead=True)

    both = case("forward + backward", {key: with_backward(*norm) for key, norm in norms.items()})
    with torch.no_grad():
        forward = case(
            "no gradient", {key: without_gradient(norm) for key, (norm, _) in norms.items()}
        )
    return [both, forward]
