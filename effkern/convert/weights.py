"""Centring parameters, in float64 while a conversion is checked and then in their own dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effkern.convert.axes import Axis
from effkern.convert.demands import Key
from effkern.convert.plan import Plan
from effkern.convert.trace import Trace, place

__all__ = [
    "as_before",
    "centred",
    "centred_weights",
    "edited_weights",
    "in_float64",
    "mean_along",
    "scaled",
    "split",
]


def split(value: Tensor, axis: Axis, features: int) -> Tensor:
    """A parameter with the feature axis as dimension ``axis.dim + 1``, whole."""
    before, after = value.shape[: axis.dim], value.shape[axis.dim + 1 :]
    return value.reshape(*before, axis.outer, features, axis.inner, *after)


def mean_along(value: Tensor, axis: Axis, features: int) -> Tensor:
    """The mean of a parameter along the feature axis, in the shape of `split` with a one there."""
    return split(value, axis, features).mean(axis.dim + 1, keepdim=True)


def centred(value: Tensor, axis: Axis, features: int) -> Tensor:
    """A parameter minus its mean along the feature axis."""
    return (split(value, axis, features) - mean_along(value, axis, features)).reshape(value.shape)


def scaled(value: Tensor, axis: Axis, features: int, scale: Tensor | None) -> Tensor:
    """A parameter times a scale of one entry for each feature, of any shape; None for one."""
    if scale is None:
        return value
    parts = split(value, axis, features)
    along = parts.dim() - axis.dim - 2
    return (parts * scale.reshape(features, *[1] * along)).reshape(value.shape)


def edited_weights(
    trace: Trace, plan: Plan, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The new values of all edited parameters, by name; the tensors that they replace stay.

    Args:
        trace: of the model.
        plan: what is edited.
        tensors: what to compute them from; by default the model's own.
    """
    old = trace.tensors if tensors is None else tensors
    return as_before(centred_weights(trace, plan, old), old)


def centred_weights(trace: Trace, plan: Plan, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new values of all parameters that a plan centres or sets to one, in float64."""

    def edited(key: Key) -> Tensor:
        value = old[trace.parameters[key.node]].detach().double()
        scale = None
        if key.scale is not None:
            scale = old[trace.parameters[key.scale]].detach().double()
        return centred(scaled(value, key.axis, key.features, scale), key.axis, key.features)

    new = {trace.parameters[node]: edited(key) for node, key in plan.edits.items()}
    for node in plan.ones:
        name = trace.parameters[node]
        new[name] = torch.ones_like(old[name], dtype=torch.float64)
    return new


def as_before(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New values in the dtypes of those that they replace."""
    return {name: value.to(old[name].dtype) for name, value in new.items()}


@contextmanager
def in_float64(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Let a model have float64 twins of its parameters and buffers; gives the twins by name.

    The tensors themselves are not touched, nor are hooks on them. Tied ones stay tied.
    """
    storage: dict[object, Tensor] = {}
    twins: dict[int, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in twins:
            data = tensor.detach()
            wide = torch.float64 if tensor.is_floating_point() else tensor.dtype
            copied = storage.setdefault(place(data), data.to(wide, copy=True))
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, tensor.requires_grad)
            twins[id(tensor)] = copied
        return twins[id(tensor)]

    containers: list[Any] = [c for m in model.modules() for c in (m._parameters, m._buffers)]
    before = [(container, dict(container)) for container in containers]
    try:
        for container in containers:
            for name, tensor in container.items():
                if tensor is not None:
                    container[name] = twin(tensor)
        named = dict(model.named_parameters(remove_duplicate=False))
        yield named | dict(model.named_buffers(remove_duplicate=False))
    finally:
        for container, contents in before:
            container.clear()
            container.update(contents)
