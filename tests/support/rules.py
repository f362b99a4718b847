"""One step of any update rule three ways: effkern's, eager PyTorch's, and PyTorch's in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

import effkern
from effkern.ops import step as ops
from tests.support import oracles
from tests.support.accuracy import assert_as_accurate


@dataclass
class Tensors:
    """What a step reads and writes: the lists of a rule's op."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    steps: list[Tensor]

    def lists(self) -> list[list[Tensor]]:
        return [self.params, self.grads, *self.states, self.steps]

    @staticmethod
    def of(lists: Sequence[list[Tensor]]) -> Tensors:
        params, grads, *states, steps = lists
        return Tensors(params, grads, states, steps)

    def clone(self, dtype: torch.dtype | None = None) -> Tensors:
        """A copy on the CPU; ``dtype`` for all but the steps."""
        *values, steps = self.lists()
        copies = [[t.detach().to("cpu", dtype, copy=True) for t in one] for one in values]
        return Tensors.of([*copies, [step.clone() for step in steps]])

    def alone(self, i: int) -> Tensors:
        """The same tensors of parameter ``i``, without the others."""
        return Tensors.of([one[i : i + 1] for one in self.lists()])


@dataclass(frozen=True)
class Rule:
    """An update rule under test.

    Attributes:
        ops: its kernel ops.
        kind: effkern's class.
        twin: the class of torch.optim; None where there is none.
        states: for each list of states its key, and whether its values are at least 0.
        options: of the ops, all of them in use.
        branches: what `options` are replaced by to reach every branch.
        by_torch: a step on `Tensors` in plain PyTorch, in the tensors' own dtype.
        arguments: the class's arguments for options of the ops.
        counts: whether steps are counted; "private" where no state holds the count.
    """

    ops: ops.RuleOps
    kind: type[torch.optim.Optimizer]
    twin: type[torch.optim.Optimizer] | None
    states: dict[str, bool]
    options: dict[str, Any]
    branches: tuple[dict[str, Any], ...]
    by_torch: Callable[[Tensors, dict[str, Any]], None]
    arguments: Callable[[dict[str, Any]], dict[str, Any]] = dict
    counts: bool | str = True

    @property
    def name(self) -> str:
        return self.ops.name

    def kept(self, options: dict[str, Any]) -> list[bool]:
        """For each list of states, whether these options ask for it."""
        return [name is not None for name in self._names(options)]

    def _names(self, options: dict[str, Any]) -> tuple[str | None, ...]:
        own = {name: options[name] for name in self.options}
        group = self.kind([torch.zeros(1)], **self.arguments(own)).param_groups[0]
        return self.kind._states(None, group)  # type: ignore[attr-defined]

    def by_lists(self, tensors: Tensors, options: dict[str, Any]) -> None:
        """A step by the op on lists."""
        (kernel,) = self.ops.from_lists(tensors.params[0])
        kernel(*self.passed(tensors, options), **options)

    def passed(self, tensors: Tensors, options: dict[str, Any]) -> list[list[Tensor]]:
        """The lists as the op takes them: those that the options do not ask for are empty."""
        kept = self.kept(options)
        states = [one if keep else [] for one, keep in zip(tensors.states, kept, strict=True)]
        steps = tensors.steps if self.counts else []
        return [tensors.params, tensors.grads, *states, steps, [], [], []]

    def by_optimizer(self, tensors: Tensors, options: dict[str, Any]) -> None:
        """A step by effkern's class, whose state the tensors are."""
        optimizer = self.kind(tensors.params, **self.arguments(options))
        names = self._names(options)
        for i, param in enumerate(tensors.params):
            param.grad = tensors.grads[i]
            state = optimizer.state[param]
            state.clear()
            if self.counts is True:
                state["step"] = tensors.steps[i]
            elif self.counts == "private" and tensors.steps[i] == 0:
                continue  # the class makes the state, and so knows that it is new
            for name, one in zip(names, tensors.states, strict=True):
                if name is not None:
                    state[name] = one[i]
        optimizer.step()
        for i, param in enumerate(tensors.params):
            if self.counts == "private":
                tensors.steps[i] += 1
            for name, one in zip(names, tensors.states, strict=True):
                if name is not None:
                    one[i] = optimizer.state[param][name]


def random_tensors(
    rule: Rule,
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
        rule: whose states to make.
        shapes: of the parameters.
        dtype: of all but the steps.
        device: likewise.
        steps: how many steps each parameter has taken, over and over.
        step_dtype: of the counters.
        offset: elements by which each parameter begins behind an aligned address; its gradient and
            its states begin one more each.
    """

    def make(shape: int | tuple[int, ...], kind: int, values: Callable[[Tensor], Tensor]) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        numel, skip = torch.Size(shape).numel(), (offset + kind) if offset else 0
        stored = torch.zeros(numel + skip, dtype=dtype, device=device)
        stored[skip:] = values(torch.randn(numel)).to(device, dtype)
        return stored[skip:].view(shape)

    def of_state(not_negative: bool) -> Callable[[Tensor], Tensor]:
        # The square of the second kind stays below the first: a mean of squares and a mean.
        return (lambda z: z.square() + 0.1) if not_negative else (lambda z: 0.3 * z.tanh())

    kinds = [lambda z: z, lambda z: z, *map(of_state, rule.states.values())]
    lists = [[make(shape, kind, f) for shape in shapes] for kind, f in enumerate(kinds)]
    counters = [steps[i % len(steps)] for i in range(len(shapes))]
    return Tensors.of([*lists, [torch.tensor(float(t), dtype=step_dtype) for t in counters]])


def check_step(rule: Rule, tensors: Tensors, step: str = "by_lists", **changed: Any) -> None:
    """Take one step and compare everything it writes with float64, by the rule of agreement.

    Where a dtype is narrower than what it is computed in, no value may be more than one rounding
    off, however much eager PyTorch loses.

    Args:
        rule: under test.
        tensors: updated in place.
        step: "by_lists" or "by_optimizer".
        changed: in which the options differ from those of the rule.
    """
    options = {**rule.options, **changed}
    eager, exact = tensors.clone(), tensors.clone(torch.float64)
    untouched = tensors.clone()
    getattr(rule, step)(tensors, options)
    rule.by_torch(eager, options)
    rule.by_torch(exact, options)
    dtype = tensors.params[0].dtype
    # The float64 step is no more exact than ours in float64.
    atol = {torch.float32: 1e-9, torch.float64: 2e-14}.get(dtype, 1e-7)
    kept = rule.kept(options)
    names = ["params", *rule.states]
    pairs = zip(
        *([one.params, *one.states] for one in (tensors, eager, exact, untouched)), strict=True
    )
    for name, keep, (mine, theirs, right, before) in zip(names, [True, *kept], pairs, strict=True):
        for i, (a, e, x, b) in enumerate(zip(mine, theirs, right, before, strict=True)):
            what = f"{name}[{i}] of shape {tuple(a.shape)}"
            if not keep:
                assert torch.equal(a.detach().cpu(), b), f"{what} was written"
                continue
            assert_as_accurate(a, e, x, atol=atol, what=what)
            # LAMB's direction comes from the states as they are stored, as eager PyTorch's does.
            if dtype in (torch.bfloat16, torch.float16) and rule.name != "lamb":
                eps = torch.finfo(a.dtype).eps
                torch.testing.assert_close(
                    a.detach().cpu().double(), x, rtol=eps, atol=1e-6, equal_nan=True
                )
    for a, b in zip(tensors.grads, untouched.grads, strict=True):
        assert torch.equal(a.detach().cpu(), b), "grads was written"
    for a, b in zip(tensors.steps, untouched.steps, strict=True):
        assert a.dtype == b.dtype
        assert a.item() == b.item() + bool(rule.counts), "step"


# ---- the rules in plain PyTorch ----


def _adam(tensors: Tensors, options: dict[str, Any]) -> None:
    options = dict(options)
    assert options.pop("bias_correction")
    adam(
        tensors.params,
        tensors.grads,
        *tensors.states,
        tensors.steps,
        foreach=False,
        decoupled_weight_decay=options.pop("decoupled"),
        **options,
    )


def _sgd(tensors: Tensors, options: dict[str, Any]) -> None:
    buffers: list[Any] = [
        None if step == 0 else buffer
        for step, buffer in zip(tensors.steps, tensors.states[0], strict=True)
    ]
    sgd(tensors.params, tensors.grads, buffers, foreach=False, fused=False, **options)
    for i, buffer in enumerate(buffers):
        tensors.steps[i] += 1
        if buffer is not None:
            tensors.states[0][i] = buffer


def _adagrad(tensors: Tensors, options: dict[str, Any]) -> None:
    adagrad(tensors.params, tensors.grads, *tensors.states, tensors.steps, foreach=False, **options)


def _rmsprop(tensors: Tensors, options: dict[str, Any]) -> None:
    square_avgs, buffers, grad_avgs = tensors.states
    rmsprop(
        tensors.params,
        tensors.grads,
        square_avgs,
        grad_avgs,
        buffers,
        tensors.steps,
        foreach=False,
        **options,
    )


def _adadelta(tensors: Tensors, options: dict[str, Any]) -> None:
    adadelta(
        tensors.params, tensors.grads, *tensors.states, tensors.steps, foreach=False, **options
    )


def _lion(tensors: Tensors, options: dict[str, Any]) -> None:
    for lists in zip(tensors.params, tensors.grads, tensors.states[0], strict=True):
        oracles.lion(*lists, **options)


def _lamb(tensors: Tensors, options: dict[str, Any]) -> None:
    for step in tensors.steps:
        step += 1
    for p, g, m, v, t in zip(*tensors.lists(), strict=True):
        oracles.lamb(p, g, m, v, t.item(), **options)


def _with_betas(options: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in options.items() if not name.startswith("beta")}
    return {**rest, "betas": (options["beta1"], options["beta2"])}


def _of_adam(options: dict[str, Any]) -> dict[str, Any]:
    options = _with_betas(options)
    decoupled = options.pop("decoupled")
    return {**options, "decoupled_weight_decay": decoupled}


_MAXIMIZE = {"maximize": True}
_NO_DECAY = {"weight_decay": 0.0}

RULES = (
    Rule(
        ops.adam,
        effkern.FusedAdam,
        torch.optim.Adam,
        {"exp_avg": False, "exp_avg_sq": True, "max_exp_avg_sq": True},
        {
            "lr": 0.01,
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "decoupled": False,
            "amsgrad": False,
            "maximize": False,
            "bias_correction": True,
        },
        ({}, {"decoupled": True}, {"amsgrad": True, "decoupled": True}, _MAXIMIZE, _NO_DECAY),
        _adam,
        _of_adam,
    ),
    Rule(
        ops.sgd,
        effkern.FusedSGD,
        torch.optim.SGD,
        {"momentum_buffer": False},
        {
            "lr": 0.01,
            "momentum": 0.9,
            "dampening": 0.3,
            "weight_decay": 0.1,
            "nesterov": False,
            "maximize": False,
        },
        (
            {},
            {"momentum": 0.0, "dampening": 0.0},
            {"nesterov": True, "dampening": 0.0},
            _MAXIMIZE,
            _NO_DECAY,
        ),
        _sgd,
        counts="private",
    ),
    Rule(
        ops.adagrad,
        effkern.FusedAdagrad,
        torch.optim.Adagrad,
        {"sum": True},
        {"lr": 0.01, "lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.1, "maximize": False},
        ({}, _MAXIMIZE, _NO_DECAY, {"lr_decay": 0.0}),
        _adagrad,
    ),
    Rule(
        ops.rmsprop,
        effkern.FusedRMSprop,
        torch.optim.RMSprop,
        {"square_avg": True, "momentum_buffer": False, "grad_avg": False},
        {
            "lr": 0.01,
            "alpha": 0.9,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "momentum": 0.8,
            "centered": True,
            "maximize": False,
        },
        (
            {},
            {"centered": False},
            {"momentum": 0.0},
            {"momentum": 0.0, "centered": False},
            _MAXIMIZE,
            _NO_DECAY,
        ),
        _rmsprop,
    ),
    Rule(
        ops.adadelta,
        effkern.FusedAdadelta,
        torch.optim.Adadelta,
        {"square_avg": True, "acc_delta": True},
        {"lr": 0.5, "rho": 0.9, "eps": 1e-3, "weight_decay": 0.1, "maximize": False},
        ({}, _MAXIMIZE, _NO_DECAY),
        _adadelta,
    ),
    Rule(
        ops.lion,
        effkern.FusedLion,
        None,
        {"exp_avg": False},
        {"lr": 0.01, "beta1": 0.8713, "beta2": 0.77, "weight_decay": 0.1, "maximize": False},
        ({}, _MAXIMIZE, _NO_DECAY),
        _lion,
        _with_betas,
        counts=False,
    ),
    Rule(
        ops.lamb,
        effkern.FusedLAMB,
        None,
        {"exp_avg": False, "exp_avg_sq": True},
        {
            "lr": 0.01,
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "maximize": False,
        },
        ({}, _MAXIMIZE, _NO_DECAY),
        _lamb,
        _with_betas,
    ),
)
BY_NAME = {rule.name: rule for rule in RULES}
