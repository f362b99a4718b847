"""Adam's kernel ops: one from lists of tensors, one from a plan.

``_adam_`` takes every tensor and raises the version counters of those it writes; torch.compile,
opcheck and the reference backend use it. ``_adam_planned_`` takes a table of addresses that
`effkern.optim.plan` keeps between steps and `effkern.ops.plan` puts the gradients in; what it
writes is invisible to PyTorch, and its caller raises the version counters. ``_adam_scheduled_`` is
``_adam_`` with the learning rate in a one-element tensor, which a compiled graph can take as an
input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference import adam as reference
from effkern.ops._declare import (
    Family,
    declare,
    define,
    imported_at_first_call,
    library,
)
from effkern.ops._versions import raise_versions
from effkern.ops.plan import PLAN, untraceable

_LISTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps"
)
_OPTIONS = (
    "float beta1, float beta2, float eps, float weight_decay,"
    " bool decoupled, bool amsgrad, bool maximize"
)


def _adam_fake(*args: Any, **kwargs: Any) -> None:
    return None


declare(
    "_adam_",
    f"({_LISTS}, *, float lr, {_OPTIONS}) -> ()",
    fake=_adam_fake,
    reference=reference.adam_,
    triton=imported_at_first_call("effkern.backends.triton.adam:adam_"),
)
declare(
    "_adam_planned_",
    f"{PLAN}, *, float lr, {_OPTIONS}) -> ()",
    fake=untraceable,
    reference=None,
    triton=imported_at_first_call("effkern.backends.triton.adam:adam_planned_"),
)
raise_versions("_adam_")
from_lists = Family("_adam_")
from_plan = Family("_adam_planned_")


def _adam_scheduled_(*lists: list[Tensor], lr: Tensor, **options: Any) -> None:
    (kernel,) = from_lists(lists[0][0])
    kernel(*lists, lr=lr.item(), **options)


define("_adam_scheduled_", f"({_LISTS}, *, Tensor lr, {_OPTIONS}) -> ()", _adam_fake)
library.impl("_adam_scheduled_", _adam_scheduled_, "CompositeExplicitAutograd")
scheduled = torch.ops.effkern._adam_scheduled_.default
