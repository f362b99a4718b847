"""Ways to store what a step updates that have kernels of their own, and plans for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkern.ops.plan import put_gradients_
from effkern.optim.plan import Plan
from effkern.optim.storage import Storage
from tests.simt.variants import VARIANTS, Variant
from tests.support.stored import Stored


@dataclass(frozen=True)
class Way:
    """How a step's tensors are stored.

    Attributes:
        dtype: of parameters and gradients.
        state: the dtype of states, or "int8".
        masters: whether there are float32 masters.
        keys: whether parameters are rounded stochastically.
    """

    dtype: torch.dtype
    state: torch.dtype | str
    masters: bool = False
    keys: bool = False

    def __str__(self) -> str:
        extras = ("masters" * self.masters, "stochastic" * self.keys)
        return "-".join([str(self.dtype), str(self.state), *filter(None, extras)])

    @property
    def quantized(self) -> bool:
        """Whether states are stored in 8 bits."""
        return self.state == "int8"

    def make(self, variant: Variant, sizes: Sequence[Any], **more: Any) -> Stored:
        """Tensors in the middle of a training."""
        return Stored(
            variant.rule,
            list(sizes),
            self.dtype,
            "cpu",
            self.state,
            variant.options,
            masters=self.masters,
            keys=self.keys,
            **more,
        )


WAYS = (
    Way(torch.float32, "int8"),
    Way(torch.float32, torch.bfloat16),
    Way(torch.bfloat16, torch.float32),
    Way(torch.bfloat16, torch.bfloat16, keys=True),
    Way(torch.bfloat16, torch.bfloat16, masters=True),
    Way(torch.bfloat16, "int8", masters=True, keys=True),
    Way(torch.float16, torch.float32, masters=True),
    Way(torch.float16, torch.float16, masters=True),
    Way(torch.float16, "int8"),
)

#: Adam and LAMB in every way, the others, whose kernels branch alike, in three. Without states it
#: is masters and keys alone that ask for a kernel of its own.
CASES = [
    (variant, way)
    for variant in VARIANTS
    for way in (WAYS if variant in (VARIANTS[0], VARIANTS[-1]) else (WAYS[0], WAYS[5], WAYS[6]))
    if variant.states or way.masters or way.keys
]


def overload(variant: Variant, name: str = "simt") -> Callable[..., None]:
    """The op on lists."""
    return getattr(getattr(torch.ops.effkern, f"_{variant.rule.name}_"), name)  # type: ignore[no-any-return]


def planned(
    variant: Variant, way: Way, stored: Stored, *, on_device: bool
) -> tuple[Plan, Callable[..., None]]:
    """A plan for the overload ``simt``, and a function that takes a step by it.

    Args:
        on_device: whether step counters count as those on a device.
    """
    count = len(stored.params)
    scales: list[list[Tensor]] = []
    kept = 0
    for one in stored.states:
        here = bool(one) and way.quantized
        scales.append(stored.scales[kept * count :][:count] if here else [])
        kept += here
    as_param = variant.states == 0 or way.state == way.dtype
    plan = Plan(
        stored.params,
        stored.states,
        stored.steps,
        Storage(way.state, as_param, way.masters, way.keys),
        scales,
        stored.masters,
        stored.keys,
        False,
    )
    if on_device:
        plan.layouts[1] |= 2  # Steps::on_device of csrc/torch/multi_tensor.h
    op = getattr(torch.ops.effkern, f"_{variant.rule.name}_planned_").simt

    def step(**keywords: Any) -> None:
        changed = put_gradients_(
            plan.table, plan.device_table, plan.layouts, stored.params, stored.grads
        )
        assert changed >= 0
        op(*plan.arguments(), changed > 0, **{**variant.options, **keywords})

    return plan, step
