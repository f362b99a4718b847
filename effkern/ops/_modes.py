"""What surrounds a call: transforms, tracing and autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch_is_active = torch._C._are_functorch_transforms_active


def transforms_are_active() -> bool:
    """Whether torch.func or forward-mode autograd is at work, which follow plain formulas alone."""
    return _functorch_is_active() or forward_ad._current_level >= 0


def is_traced_or_mapped(tensor: Tensor) -> bool:
    """Whether what is done with a tensor becomes a graph, or is done for each entry of a batch."""
    return (
        torch.compiler.is_compiling()
        or _functorch_is_active()
        # Of torch.autograd.grad(is_grads_batched=True).
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def may_be_looked_at(tensor: Tensor) -> bool:
    """Whether a branch may depend on a tensor's numbers: they are there, without waiting for a
    device, and nobody follows what is done with them.
    """
    return (
        tensor.is_cpu
        and not is_traced_or_mapped(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
        and type(tensor) in (Tensor, torch.nn.Parameter)
    )


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; for some, as meta, there is none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast is off for a kind of device."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
