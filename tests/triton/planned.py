"""Steps by plan on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch

from effkern.ops.plan import put_gradients_
from effkern.optim.plan import Plan
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
        params, _, *states, steps = variant.lists(tensors)
        self._tensors, self._options = tensors, variant.options  # a plan keeps nothing alive
        self._op = getattr(torch.ops.effkern, f"_{variant.rule.name}_planned_").triton
        self.plan = Plan(params, states, steps, on_cpu=False)
        if on_device:
            self.plan.layouts[1] |= 2  # Steps::on_device of csrc/torch/multi_tensor.h

    def step(self, **keywords: Any) -> None:
        """One step; ``keywords`` of the op, besides the variant's options."""
        plan, tensors = self.plan, self._tensors
        changed = put_gradients_(
            plan.table, plan.device_table, plan.layouts, tensors.params, tensors.grads
        )
        assert changed >= 0
        self._op(
            plan.table,
            plan.device_table,
            plan.chunks,
            plan.layouts,
            changed > 0,
            **{**self._options, **keywords},
        )
