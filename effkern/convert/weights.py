"""Centring parameters, in float64 while a conversion is checked and then in their own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from effkern.convert.axes import Axis
from effkern.convert.demands import Key
from effkern.convert.plan import Plan
from effkern.convert.trace import Trace, place

__all__ = ["centred", "edited_weights", "in_float64", "mean_along", "scaled", "split"]


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


def edited_weights(trace: Trace, plan: Plan) -> dict[str, Tensor]:
    """The new values of all edited parameters, by name; the tensors that they replace stay."""
    tensors = trace.tensors

    def edited(key: Key) -> Tensor:
        value = tensors[trace.parameters[key.node]].detach()
        scale = None
        if key.scale is not None:
            scale = tensors[trace.parameters[key.scale]].detach().double()
        product = scaled(value.double(), key.axis, key.features, scale)
        return centred(product, key.axis, key.features).to(value.dtype)

    new = {trace.parameters[node]: edited(key) for node, key in plan.edits.items()}
    for node in plan.ones:
        new[trace.parameters[node]] = torch.ones_like(tensors[trace.parameters[node]])
    return new


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Let parameters and buffers be float64, and then be what they were, bit for bit."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    before = [(tensor, tensor.data) for tensor in tensors.values()]
    wide: dict[object, Tensor] = {}
    try:
        for tensor, data in before:
            known = wide.setdefault(place(data), data.to(torch.float64, copy=True))
            tensor.data = known
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
