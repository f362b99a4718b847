"""How a norm reads its parameters in each call.

As ``module.weight`` and ``module.bias``, of which `nn.Module` makes a tenth of a small norm's call:
there a parameter is found last, when every other way has failed.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def weight_of(module: nn.Module) -> Any:
    """The weight: a tensor or None."""
    registered = module._parameters
    return registered["weight"] if "weight" in registered else module.weight  # noqa: SIM401


def weight_and_bias(
    module: nn.Module, names: tuple[str, str] = ("weight", "bias")
) -> tuple[Any, Any]:
    """Both, each a tensor or None, under the names that they have."""
    weight, bias = names
    registered = module._parameters
    return (
        registered[weight] if weight in registered else getattr(module, weight),
        registered[bias] if bias in registered else getattr(module, bias),
    )
