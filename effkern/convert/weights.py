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

__all__ = ["centred", "edited_weights", "in_float64"]


def centred(value: Tensor, axis: Axis, features: int, scale: Tensor | None = None) -> Tensor:
    """A parameter minus its mean along the feature axis; after multiplication by a scale.

    Args:
        value: any shape, with the axis in it.
        axis: where the features lie.
        features: how many they are.
        scale: one entry for each feature.
    """
    shape = value.shape
    parts = value.reshape(
        *shape[: axis.dim], axis.outer, features, axis.inner, *shape[axis.dim + 1 :]
    )
    along = axis.dim + 1
    if scale is not None:
        parts = parts * scale.reshape(features, *[1] * (parts.dim() - along - 1))
    return (parts - parts.mean(along, keepdim=True)).reshape(shape)


def edited_weights(trace: Trace, plan: Plan) -> dict[str, Tensor]:
    """The new values of all edited parameters, by name; the tensors that they replace stay."""
    tensors = trace.tensors

    def edited(key: Key) -> Tensor:
        value = tensors[trace.parameters[key.node]].detach()
        scale = None
        if key.scale is not None:
            scale = tensors[trace.parameters[key.scale]].detach().double()
        return centred(value.double(), key.axis, key.features, scale).to(value.dtype)

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
