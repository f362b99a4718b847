"""What the norms refuse: the first argument that does not fit, named, with what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops._declare import DTYPES

strided = torch.strided


def fits(value: Any, shape: Sequence[int], x: Tensor) -> bool:
    """Whether a parameter is taken beside ``x``; in the cheapest form, every call pays for it."""
    return value is None or (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype in DTYPES
        and value.layout is strided
        and ((value.is_cpu and x.is_cpu) or value.device == x.device)
    )


def check(
    name: str,
    x: Any,
    residual: Any,
    normalized_shape: Sequence[int],
    parameters: dict[str, Any],
) -> None:
    """Raise for the first argument of the function ``name`` that does not fit.

    Raises:
        TypeError: if an argument that must be a tensor is none.
        RuntimeError: if a dtype, shape, device or layout does not fit.
    """
    dims = len(normalized_shape)
    check_x(name, x)
    if dims == 0:
        raise RuntimeError(f"{name}: normalized_shape must name at least one dimension, got ()")
    if x.shape[-dims:] != tuple(normalized_shape):
        raise RuntimeError(
            f"{name}: x must end in normalized_shape={tuple(normalized_shape)}, "
            f"got shape {tuple(x.shape)}"
        )
    shapes = dict.fromkeys(parameters, tuple(normalized_shape)) | {"residual": tuple(x.shape)}
    for argument, value in (parameters | {"residual": residual}).items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: {argument} must be a tensor or None, got {type(value).__name__}"
            )
        check_kind(name, argument, value)
        if value.shape != shapes[argument]:
            raise RuntimeError(
                f"{name}: {argument} must have shape {shapes[argument]}, got {tuple(value.shape)}"
            )
        if value.device != x.device:
            raise RuntimeError(
                f"{name}: {argument} must be on x's device {x.device}, got {value.device}"
            )
    if residual is not None and residual.dtype != x.dtype:
        raise RuntimeError(f"{name}: residual must have x's dtype {x.dtype}, got {residual.dtype}")


def check_x(name: str, x: Any) -> None:
    """Raise unless x is a tensor that the norms take."""
    check_kind(name, "x", x)


def check_kind(name: str, argument: str, value: Any) -> None:
    """Raise unless an argument is a dense tensor of a dtype that the kernels take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise RuntimeError(
            f"{name}: {argument} must be float32, float64, bfloat16 or float16, got {value.dtype}"
        )
    if value.layout != strided:
        raise RuntimeError(f"{name}: {argument} must be a dense tensor, got layout {value.layout}")
