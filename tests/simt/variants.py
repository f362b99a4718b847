"""Every compiled form of the update rules' kernels, and plans for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkern.ops.plan import put_gradients_
from effkern.optim.plan import Plan
from effkern.optim.storage import Storage
from tests.support.rules import BY_NAME, Rule, Tensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK = 8192
PLAIN = Storage(state=torch.float32, as_param=True, master=False, stochastic=False)


@dataclass(frozen=True)
class Variant:
    """One form of a rule's kernel.

    Attributes:
        rule: whose.
        changed: what asks for this form among the rule's options.
        kept: for each list of states, whether it reads and writes it.
        reads_steps: whether its formula knows the number of the step.
    """

    rule: Rule
    changed: dict[str, Any]
    kept: tuple[bool, ...]
    reads_steps: bool

    def __str__(self) -> str:
        return "-".join(
            [self.rule.name, *(f"{name}={value}" for name, value in self.changed.items())]
        )

    @property
    def options(self) -> dict[str, Any]:
        return {**self.rule.options, **self.changed}

    @property
    def states(self) -> int:
        """How many it reads and writes."""
        return sum(self.kept)

    def lists(self, tensors: Tensors) -> list[list[Any]]:
        """What the op on lists takes: states, step counters, no masters, scales and keys."""
        states = [one if kept else [] for one, kept in zip(tensors.states, self.kept, strict=True)]
        return [tensors.params, tensors.grads, *states, tensors.steps, [], [], []]

    def by_lists(self, tensors: Tensors, overload: str = "simt", **keywords: Any) -> None:
        """A step by the op on lists."""
        op = getattr(torch.ops.effkern, f"_{self.rule.name}_")
        getattr(op, overload)(*self.lists(tensors), **{**self.options, **keywords})


def _variant(name: str, kept: tuple[bool, ...], reads_steps: bool, **changed: Any) -> Variant:
    return Variant(BY_NAME[name], changed, kept, reads_steps)


VARIANTS = (
    _variant("adam", (True, True, False), True, amsgrad=False),
    _variant("adam", (True, True, True), True, amsgrad=True),
    _variant("sgd", (False,), True, momentum=0.0, dampening=0.0),
    _variant("sgd", (True,), True),
    _variant("adagrad", (True,), True),
    _variant("rmsprop", (True, False, False), False, momentum=0.0, centered=False),
    _variant("rmsprop", (True, True, False), False, momentum=0.8, centered=False),
    _variant("rmsprop", (True, False, True), False, momentum=0.0, centered=True),
    _variant("rmsprop", (True, True, True), False, momentum=0.8, centered=True),
    _variant("adadelta", (True, True), False),
    _variant("lion", (True,), False),
    _variant("lamb", (True, True), True),
)


class Planned:
    """Steps by plan of the overloads ``simt``.

    Args:
        variant: of which rule.
        tensors: updated in place.
        on_device: whether the step counters count as those on a device, which the kernel reads and
            increases.
    """

    def __init__(self, variant: Variant, tensors: Tensors, *, on_device: bool) -> None:
        params, _, *states, steps, _, _, _ = variant.lists(tensors)
        self._tensors, self._options = tensors, variant.options  # a plan keeps nothing alive
        self._op = getattr(torch.ops.effkern, f"_{variant.rule.name}_planned_").simt
        self.plan = Plan(params, states, steps, PLAIN, [], [], [], on_cpu=False)
        if on_device:
            self.plan.layouts[1] |= 2  # Steps::on_device of csrc/torch/multi_tensor.h

    def step(self, grads: Sequence[Tensor] | None = None, **keywords: Any) -> None:
        """One step.

        Args:
            grads: other gradients than those of the tensors.
            keywords: of the op, besides the variant's options.
        """
        moved = self._put(grads)
        self._op(*self.plan.arguments(), moved, **{**self._options, **keywords})

    def clipped_step(self, squares: Tensor, max_norm: float) -> None:
        """The same with gradients clipped, whose sum of squares goes to ``squares[0]``."""
        squares_op = torch.ops.effkern._squares_planned_.simt
        squares_op(*self.plan.arguments(), self._put(None), squares, 0)
        options = {**self._options, "squares": squares, "max_norm": max_norm}
        self._op(*self.plan.arguments(), False, **options)

    def _put(self, grads: Sequence[Tensor] | None) -> bool:
        """Put the gradients in the plan; whether that has changed it."""
        plan = self.plan
        grads = list(self._tensors.grads if grads is None else grads)
        changed = put_gradients_(
            plan.table, plan.device_table, plan.layouts, self._tensors.params, grads
        )
        assert changed >= 0
        return changed > 0


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy that starts `offset` elements into its memory."""
    memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:]
    return memory.copy_(tensor.flatten()).view(tensor.shape)


def blocks_of(numels: Sequence[int]) -> list[int]:
    """The blocks of each tensor."""
    return [max(1, -(-numel // CHUNK)) for numel in numels]
