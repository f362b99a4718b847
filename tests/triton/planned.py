"""Steps by plan on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch

from effkern.ops.plan import put_gradients_
from effkern.optim.plan import Plan
from effkern.optim.storage import Storage
from tests.simt.variants import Variant
from tests.support.rules import Tensors


class Planned:
    """Steps of one variant of a rule.

    Args:
        variant: of which rule.
        tensors: updated in place.
        on_device: whether the step counters count as those on a device, which the kernel reads and
            increases.
    """

    def __init__(self, variant: Variant, tensors: Tensors, *, on_device: bool) -> None:
        self._tensors, self._options = tensors, variant.options  # a plan keeps nothing alive
        self._op = getattr(torch.ops.effkern, f"_{variant.rule.name}_planned_").triton
        states = [
            one if keep else [] for one, keep in zip(tensors.states, variant.kept, strict=True)
        ]
        params = tensors.params
        plain = Storage(state=params[0].dtype, as_param=True, master=False, stochastic=False)
        self.plan = Plan(params, states, tensors.steps, plain, [[] for _ in states], [], [], False)
        if on_device:
            self.plan.layouts[1] |= 2  # Steps::on_device of csrc/torch/multi_tensor.h

    def put_gradients(self) -> bool:
        """Whether that moved the table on."""
        plan, tensors = self.plan, self._tensors
        changed = put_gradients_(
            plan.table, plan.device_table, plan.layouts, tensors.params, tensors.grads
        )
        assert changed >= 0
        return changed > 0

    def step(self, **keywords: Any) -> None:
        """One step; ``keywords`` of the op, besides the variant's options."""
        moved = self.put_gradients()
        self._op(*self.plan.arguments(), moved, **{**self._options, **keywords})

    def clipped_step(self, squares: torch.Tensor, max_norm: float) -> None:
        """The same with gradients clipped, whose sum of squares goes to ``squares[0]``."""
        moved = self.put_gradients()
        torch.ops.effkern._squares_planned_.triton(*self.plan.arguments(), moved, squares, 0)
        self._op(*self.plan.arguments(), False, squares=squares, max_norm=max_norm, **self._options)
