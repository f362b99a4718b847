"""A step from lists of tensors whose hyperparameters are read when it runs.

A compiled graph holds a Python number as a constant, and is compiled anew where it changes. So a
graph takes an optimizer's step as ``_deferred_step_``: its arguments are the tensors, and the
learning rate and all that a group says beside it come from the optimizer at every run, as in an
eager step. What decides which tensors there are is guarded on by whoever traces them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from effkern.backends import choice
from effkern.ops._declare import define, library
from effkern.ops._versions import raise_versions
from effkern.ops.step import RuleOps


class Stepper(Protocol):
    """An optimizer as the op sees it."""

    @property
    def _rule(self) -> RuleOps:
        """Its update rule."""

    def _deferred(
        self, group: int, which: Sequence[int], tensors: dict[str, Tensor | None]
    ) -> tuple[list[bool], list[int], dict[str, Any]]:
        """What is read when the op runs.

        Args:
            group: the number of a parameter group.
            which: the places in it of the parameters to update.
            tensors: the op's keyword arguments, as they are.

        Returns:
            For each list of states of the rule whether it is kept; one key of stochastic rounding
            for each parameter, or none; the keyword arguments of the rule's op on lists.
        """


_steppers: weakref.WeakValueDictionary[str, Stepper] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(stepper: Stepper) -> str:
    """A name by which the op finds ``stepper`` for as long as it lives."""
    # Text, since Dynamo may make a symbol of a number.
    name = f"optimizer {next(_numbers)}"
    _steppers[name] = stepper
    return name


def _deferred_step_(
    stepper: str,
    group: int,
    which: Sequence[int],
    backend: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    scales: list[Tensor],
    *,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    """``effkern::_deferred_step_``: one step on every parameter, in place.

    Args:
        stepper: the name that `register` gave the optimizer.
        group: the number of its parameter group.
        which: the places of the parameters in the group.
        backend: the one that was asked for by name, or empty.
        params: as the rule's op on lists takes them, and so are the others;
        grads: their gradients.
        states: all of the first list that is kept, then of the next.
        steps: step counters, or none.
        masters: float32 masters, or none.
        scales: of states in 8 bits, or none.
        lr_tensor: as the rule's op takes it, and so are the others;
        grad_scale: that of a GradScaler;
        found_inf: its too;
        squares: of the gradients, where they are clipped.

    Raises:
        RuntimeError: if the optimizer is gone, or as the rule's op; nothing was written.
    """
    optimizer = _steppers.get(stepper)
    if optimizer is None:
        raise RuntimeError("the optimizer whose step was compiled is gone")
    tensors = {"lr_tensor": lr_tensor, "grad_scale": grad_scale, "found_inf": found_inf}
    kept, keys, keywords = optimizer._deferred(group, which, {**tensors, "squares": squares})
    rest, lists = list(states), []
    for keep in kept:
        count = len(params) if keep else 0
        lists.append(rest[:count])
        rest = rest[count:]
    with choice.use_backend(backend or None):
        (kernel,) = optimizer._rule.from_lists(params[0])
        kernel(params, grads, *lists, steps, masters, scales, keys, **keywords)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


define(
    "_deferred_step_",
    "(str stepper, int group, int[] which, str backend, Tensor(a!)[] params, Tensor[] grads,"
    " Tensor(b!)[] states, Tensor(c!)[] steps, Tensor(d!)[] masters, Tensor(e!)[] scales, *,"
    " Tensor? lr_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None,"
    " Tensor? squares=None) -> ()",
    _nothing,
    in_cuda_graphs=False,
)
library.impl("_deferred_step_", _deferred_step_, "CompositeExplicitAutograd")
raise_versions("_deferred_step_")
