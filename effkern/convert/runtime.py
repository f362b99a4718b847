"""What a converted model is made of at run time. All of it can be copied and pickled."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from effkern.ops.norm import affine_norm

__all__ = ["BiasedRMSNorm", "RecentreInput", "RecentreOutput", "RunWithRmsNorm", "recentre"]


class BiasedRMSNorm(torch.nn.RMSNorm):
    """A layer norm that reads rows of zero mean: RMSNorm, plus the layer norm's bias.

    Keeps the layer norm's ``weight`` and ``bias`` under their names; either may be None.
    """

    bias: Tensor | None
    layer_norm_in_training = False  # see `training_form`

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x / sqrt(mean(x^2) + eps) * weight + bias``, over the last dimension."""
        if self.training and self.layer_norm_in_training:
            return torch.nn.functional.layer_norm(
                x, self.normalized_shape, self.weight, self.bias, self.eps or 0.0
            )
        return affine_norm("rms_norm", x, self.normalized_shape, self.weight, self.bias, self.eps)  # type: ignore[return-value]


def recentre(x: Tensor, dim: int) -> Tensor:
    """X minus its mean along a dimension."""
    return x - x.mean(dim, keepdim=True)


def _at(value: Any, path: tuple[str | int, ...], dim: int) -> Any:
    """A value with the tensor at a path inside it recentred."""
    if not path:
        return recentre(value, dim) if isinstance(value, Tensor) else value
    parts = list(value)
    parts[path[0]] = _at(parts[path[0]], path[1:], dim)  # type: ignore[call-overload, index]
    return type(value)(parts)


class RecentreInput:
    """A forward pre-hook (with keywords) that recentres one argument.

    Args:
        name: the argument's name.
        position: where it stands when it is passed by position; None where it cannot be.
        path: inside the argument, to the tensor.
        dim: the feature dimension, negative.
    """

    def __init__(
        self, name: str, position: int | None, path: tuple[str | int, ...], dim: int
    ) -> None:
        self.name, self.position, self.path, self.dim = name, position, path, dim

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the module runs."""
        if self.name in kwargs:
            kwargs = {**kwargs, self.name: _at(kwargs[self.name], self.path, self.dim)}
        elif self.position is not None and self.position < len(args):
            changed = list(args)
            changed[self.position] = _at(changed[self.position], self.path, self.dim)
            args = tuple(changed)
        return args, kwargs


class RecentreOutput:
    """A forward hook that recentres what a module returns, or a tensor inside it.

    Args:
        path: inside the result, to the tensor.
        dim: the feature dimension, negative.
    """

    def __init__(self, path: tuple[str | int, ...], dim: int) -> None:
        self.path, self.dim = path, dim

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What the module's caller gets."""
        return _at(output, self.path, self.dim)


class RunWithRmsNorm:
    """A module's ``forward`` in which calls of layer_norm are RMSNorm plus the bias.

    For modules that call the function themselves: norms with an affine of their own, or a block
    that holds the norm's parameters.

    Args:
        module: whose forward it is.
        features: only layer norms over a last dimension of so many entries are meant.
        parameters: names of the weights and biases of those layer norms, below the module; one
            whose weight is another parameter stays a layer norm.
    """

    def __init__(self, module: nn.Module, features: tuple[int, ...], parameters: list[str]) -> None:
        self.module, self.features, self.parameters = module, features, parameters
        self.inner = vars(module).get("forward")  # a forward of the instance's own
        self.layer_norm_in_training = False  # see `training_form`

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward it stands for."""
        return inspect.signature(self._forward)

    @property
    def __code__(self) -> Any:
        """That of the forward it stands for: torch.export asks the model's forward for it."""
        return self._forward.__code__

    @property
    def _forward(self) -> Any:
        return self.inner or type(self.module).forward.__get__(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        if self.module.training and self.layer_norm_in_training:
            return self._forward(*args, **kwargs)
        known = [_parameter(self.module, name) for name in self.parameters]
        with _RmsNormMode(self.features, known):
            return self._forward(*args, **kwargs)


def _parameter(module: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


_LAYER_NORMS = (torch.nn.functional.layer_norm, torch.layer_norm)


class _RmsNormMode(TorchFunctionMode):
    def __init__(self, features: tuple[int, ...], known: list[Tensor]) -> None:
        super().__init__()
        self.features, self.known = features, known

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LAYER_NORMS:
            x, shape, weight, bias, eps = _layer_norm_arguments(*args, **kwargs)
            if tuple(shape) in [(d,) for d in self.features] and self._is_meant(weight, bias):
                return affine_norm("rms_norm", x, tuple(shape), weight, bias, eps)
        return func(*args, **kwargs)

    def _is_meant(self, *affine: Tensor | None) -> bool:
        parameters = [entry for entry in affine if isinstance(entry, nn.Parameter)]
        return all(any(entry is own for own in self.known) for entry in parameters)


def _layer_norm_arguments(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, Any, Tensor | None, Tensor | None, float]:
    return input, normalized_shape, weight, bias, eps
