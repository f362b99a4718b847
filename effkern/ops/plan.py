"""What the ops on plans have in common: the plan's arguments, and how gradients enter it.

A plan is the table of addresses that `effkern.optim.plan` makes. ``_put_gradients_`` checks that
parameters and gradients are as the plan has them and puts the gradients' addresses in its table; it
serves every update rule and device. A rule's own op on plans follows. They are two, so that the
records of thousands of tensors are let go before the update drives them out of the caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.backends import native
from effkern.backends.reference import plan as reference
from effkern.ops._declare import define, library

#: The first arguments of a rule's op on plans: those of `effkern.optim.plan.Plan`, and whether the
#: table has changed since the op last read it.
PLAN = "(Tensor(a!) table, Tensor(b!) device_table, Tensor chunks, Tensor layouts, bool moved"


def untraceable(*args: Any, **kwargs: Any) -> Any:
    """The fake kernel of an op on plans."""
    raise RuntimeError("effkern's ops on plans work on addresses and cannot be traced")


define(
    "_put_gradients_",
    "(Tensor(a!) table, Tensor device_table, Tensor layouts, Tensor[] params, Tensor[] grads)"
    " -> int",
    untraceable,
)


def fill_gap() -> None:
    """Implement ``_put_gradients_`` in Python where the CPU library does not serve."""
    if not native.serves("CPU"):
        library.impl("_put_gradients_", reference.put_gradients_, "CompositeExplicitAutograd")


def _refuse(table: Tensor, device_table: Tensor, layouts: Tensor, *lists: Any) -> int:
    """For lists with a tensor whose memory does not hold its values."""
    return -1


for _key in ("Conjugate", "Negative", "ZeroTensor"):
    library.impl("_put_gradients_", _refuse, _key)
library.impl("_put_gradients_", torch.library.fallthrough_kernel, "Autograd")
put_gradients_ = torch.ops.effkern._put_gradients_.default
