"""One Adam step three ways: effkern's, eager PyTorch's, and PyTorch's in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

import effkern
from effkern.ops import adam as ops
from tests.support.accuracy import assert_as_accurate

OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "decoupled": False,
    "amsgrad": False,
    "maximize": False,
}


@dataclass
class Tensors:
    """What a step reads and writes: the lists of ``effkern::_adam_``."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    def lists(self) -> tuple[list[Tensor], ...]:
        return (
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.max_exp_avg_sqs,
            self.steps,
        )

    def clone(self, dtype: torch.dtype | None = None) -> Tensors:
        """A copy on the CPU; ``dtype`` for all but the steps."""
        *values, steps = self.lists()
        copies = [[t.detach().to("cpu", dtype, copy=True) for t in one] for one in values]
        return Tensors(*copies, [step.clone() for step in steps])

    def alone(self, i: int) -> Tensors:
        """The same tensors of parameter ``i``, without the others."""
        return Tensors(*(one[i : i + 1] for one in self.lists()))


def random_tensors(
    shapes: Sequence[int | tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    steps: Sequence[float] = (0.0,),
    step_dtype: torch.dtype = torch.float32,
    offset: int = 0,
) -> Tensors:
    """Tensors in the middle of a training.

    Args:
        shapes: of the parameters.
        dtype: of all but the steps.
        device: likewise.
        steps: how many steps each parameter has taken, over and over.
        step_dtype: of the counters.
        offset: elements by which each parameter begins behind an aligned address; its gradient and
            its states begin one more each.
    """

    def make(shape: int | tuple[int, ...], kind: int) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        numel, skip = torch.Size(shape).numel(), (offset + kind) if offset else 0
        values = torch.randn(numel + skip)[skip:]
        if kind >= 3:
            values = values.square()
        stored = torch.zeros(numel + skip, dtype=dtype, device=device)
        stored[skip:] = values.to(device, dtype)
        return stored[skip:].view(shape)

    lists = [[make(shape, kind) for shape in shapes] for kind in range(5)]
    counters = [steps[i % len(steps)] for i in range(len(shapes))]
    return Tensors(*lists, [torch.tensor(float(t), dtype=step_dtype) for t in counters])


def by_lists(tensors: Tensors, options: dict[str, Any]) -> None:
    """A step by ``effkern::_adam_``."""
    (kernel,) = ops.from_lists(tensors.params[0])
    kernel(*_passed(tensors, options), **options)


def by_optimizer(tensors: Tensors, options: dict[str, Any]) -> None:
    """A step by `effkern.FusedAdam`, whose state the tensors are."""
    options = dict(options)
    betas = (options.pop("beta1"), options.pop("beta2"))
    optimizer = effkern.FusedAdam(
        tensors.params,
        betas=betas,
        decoupled_weight_decay=options.pop("decoupled"),
        **options,
    )
    for i, param in enumerate(tensors.params):
        param.grad = tensors.grads[i]
        optimizer.state[param] = {
            "step": tensors.steps[i],
            "exp_avg": tensors.exp_avgs[i],
            "exp_avg_sq": tensors.exp_avg_sqs[i],
        }
        if options["amsgrad"]:
            optimizer.state[param]["max_exp_avg_sq"] = tensors.max_exp_avg_sqs[i]
    optimizer.step()


def by_torch(tensors: Tensors, options: dict[str, Any]) -> None:
    """A step by PyTorch, one tensor after another."""
    options = dict(options)
    torch_adam(
        *_passed(tensors, options),
        foreach=False,
        decoupled_weight_decay=options.pop("decoupled"),
        **options,
    )


def _passed(tensors: Tensors, options: dict[str, Any]) -> tuple[list[Tensor], ...]:
    if options["amsgrad"]:
        return tensors.lists()
    return replace(tensors, max_exp_avg_sqs=[]).lists()


def check_step(tensors: Tensors, step: Any = by_lists, **options: Any) -> None:
    """Take one step and compare everything it writes with float64, by the rule of agreement.

    Where a dtype is narrower than what it is computed in, no value may be more than one rounding
    off, however much eager PyTorch loses.

    Args:
        tensors: updated in place.
        step: `by_lists` or `by_optimizer`.
        options: in which it differs from `OPTIONS`.
    """
    options = {**OPTIONS, **options}
    eager, exact = tensors.clone(), tensors.clone(torch.float64)
    untouched = tensors.clone()
    step(tensors, options)
    by_torch(eager, options)
    by_torch(exact, options)
    narrow = tensors.params[0].dtype in (torch.bfloat16, torch.float16)
    # The float64 step is no more exact than ours in float64.
    atol = {torch.float32: 0.0, torch.float64: 2e-14}.get(tensors.params[0].dtype, 1e-7)
    written = ["params", "exp_avgs", "exp_avg_sqs"] + ["max_exp_avg_sqs"] * options["amsgrad"]
    for name in written:
        for i, (a, e, x) in enumerate(
            zip(getattr(tensors, name), getattr(eager, name), getattr(exact, name), strict=True)
        ):
            what = f"{name}[{i}] of shape {tuple(a.shape)}"
            assert_as_accurate(a, e, x, atol=atol, what=what)
            if narrow:
                eps = torch.finfo(a.dtype).eps
                torch.testing.assert_close(
                    a.detach().cpu().double(), x, rtol=eps, atol=1e-6, equal_nan=True
                )
    for name in {"grads", "max_exp_avg_sqs"} - set(written):
        for a, x in zip(getattr(tensors, name), getattr(untouched, name), strict=True):
            assert torch.equal(a.detach().cpu(), x), f"{name} was written"
    for a, x in zip(tensors.steps, exact.steps, strict=True):
        assert a.dtype == x.dtype
        assert a.item() == x.item(), "step"
