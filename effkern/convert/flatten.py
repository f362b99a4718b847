"""The tensors in what a model returns, with their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["named_tensors"]

DEEPEST = 8


def named_tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside a returned value: its path such as ``past_key_values.0.1``, and itself.

    Follows mappings, sequences, dataclasses and the attributes of other objects (a key-value
    cache).
    """
    if isinstance(value, Tensor):
        yield name or "output", value
        return
    if depth > DEEPEST or value is None or isinstance(value, str | int | float | type):
        return
    if isinstance(value, Mapping):
        items = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        fields = getattr(value, "_fields", None)
        names = fields if fields is not None else map(str, range(len(value)))
        items = list(zip(names, value, strict=True))
    elif dataclasses.is_dataclass(value):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif (
        hasattr(value, "__dict__")
        and not isinstance(value, torch.nn.Module)
        and not callable(value)
    ):
        items = list(vars(value).items())
    else:
        return
    for key, entry in items:
        yield from named_tensors(entry, f"{name}.{key}" if name else key, depth + 1)
