"""What a converted model is made of at run time. All of it can be copied and pickled."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from effkern.nn import CRMSNorm
from effkern.nn.functional import crms_norm
from effkern.nn.parameters import weight_and_bias
from effkern.ops.norm import affine_norm

__all__ = [
    "BiasedRMSNorm",
    "ExpandedRMSNorm",
    "FoldedCRMSNorm",
    "RecentreInput",
    "RecentreOutput",
    "RunWithRmsNorm",
    "recentre",
]

# torch.fx goes into layers that are not PyTorch's own, and is not to go further.
torch.fx.wrap("affine_norm")


class BiasedRMSNorm(torch.nn.RMSNorm):
    """A layer norm that reads rows of zero mean: RMSNorm, plus the layer norm's bias.

    Keeps the layer norm's weight and bias under their names; either may be None.
    """

    bias: Tensor | None
    affine_names = ("weight", "bias")
    affine_has_ones = False  # whether weight and bias have leading dimensions of size one
    layer_norm_in_training = False  # see `training_form`

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x / sqrt(mean(x^2) + eps) * weight + bias``, over the last dimension."""
        weight, bias = weight_and_bias(self, self.affine_names)
        if self.affine_has_ones:
            weight, bias = (None if entry is None else entry.flatten() for entry in (weight, bias))
        if self.training and self.layer_norm_in_training:
            eps = self.eps or 0.0
            return torch.nn.functional.layer_norm(x, self.normalized_shape, weight, bias, eps)
        return affine_norm("rms_norm", x, self.normalized_shape, weight, bias, self.eps)  # type: ignore[return-value]


class ExpandedRMSNorm(BiasedRMSNorm):
    """A layer norm that reads rows of d - 1 features: it gives all d, with its affine."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """`BiasedRMSNorm`'s of the row that x stands for, whose last feature may be anything."""
        return super().forward(expanded(x))


class FoldedCRMSNorm(CRMSNorm):
    """A layer norm that reads rows of d - 1 features and gives as many, its affine folded into what
    reads them. Rows are stored with a zero in place of the last feature.

    Keeps the layer norm's ``weight`` and ``bias`` under their names; they are one and zero, are not
    read, and have no gradient.
    """  # fmt: skip

    bias: Tensor | None
    one: bool  # whether the result has a one in place of the last feature

    def forward(self, x: Tensor, residual: None = None) -> Tensor:  # type: ignore[override]
        """``x / sqrt((sum(x^2) + sum(x)^2) / (d + 1) + eps d / (d + 1))``: the CRMSNorm of the d
        stored features, which stand for d + 1. That of d - 1 is this times `left_to_readers`.
        """
        y = crms_norm(x, None, self.eps * self.d / (self.d + 1))  # type: ignore[operator]
        if self.one:
            y.select(-1, -1).fill_(1)
        return y

    @staticmethod
    def left_to_readers(d: int) -> float:
        """By what the result is to be multiplied."""
        return (d / (d + 1)) ** 0.5


def expanded(x: Tensor) -> Tensor:
    """The d features of sum zero that x stands for, which has them all but the last."""
    kept = x[..., :-1]
    return torch.cat((kept, -kept.sum(-1, keepdim=True)), -1)


def recentre(x: Tensor, dim: int, drop: bool = False) -> Tensor:
    """X minus its mean along a dimension, whose last feature then becomes zero if it is to drop."""
    centred = x - x.mean(dim, keepdim=True)
    if not drop:
        return centred
    kept = centred.narrow(dim, 0, x.shape[dim] - 1)
    return torch.cat((kept, torch.zeros_like(x.narrow(dim, 0, 1))), dim)


def _at(value: Any, path: tuple[str | int, ...], dim: int, drop: bool) -> Any:
    """A value with the tensor at a path inside it recentred."""
    if not path:
        return recentre(value, dim, drop) if isinstance(value, Tensor) else value
    parts = list(value)
    parts[path[0]] = _at(parts[path[0]], path[1:], dim, drop)  # type: ignore[call-overload, index]
    return type(value)(parts)


class RecentreInput:
    """A forward pre-hook (with keywords) that recentres one argument.

    Args:
        name: the argument's name.
        position: where it stands when it is passed by position; None where it cannot be.
        path: inside the argument, to the tensor.
        dim: the feature dimension, negative.
        drop: whether the last feature goes.
    """

    def __init__(
        self,
        name: str,
        position: int | None,
        path: tuple[str | int, ...],
        dim: int,
        drop: bool = False,
    ) -> None:
        self.name, self.position = name, position
        self.path, self.dim, self.drop = path, dim, drop

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the module runs."""
        if self.name in kwargs:
            kwargs = {**kwargs, self.name: _at(kwargs[self.name], self.path, self.dim, self.drop)}
        elif self.position is not None and self.position < len(args):
            changed = list(args)
            changed[self.position] = _at(changed[self.position], self.path, self.dim, self.drop)
            args = tuple(changed)
        return args, kwargs


class RecentreOutput:
    """A forward hook that recentres what a module returns, or a tensor inside it.

    Args:
        path: inside the result, to the tensor.
        dim: the feature dimension, negative.
        drop: whether the last feature goes.
    """

    def __init__(self, path: tuple[str | int, ...], dim: int, drop: bool = False) -> None:
        self.path, self.dim, self.drop = path, dim, drop

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What the module's caller gets."""
        return _at(output, self.path, self.dim, self.drop)


class RunWithRmsNorm:
    """A module's ``forward`` in which calls of layer_norm are RMSNorm plus the bias.

    For modules that call the function themselves: norms with an affine of their own, or a block
    that holds the norm's parameters.

    Args:
        module: whose forward it is.
        features: only layer norms over a last dimension of so many entries are meant.
        parameters: names of the weights and biases of those layer norms, below the module; one
            whose weight is another parameter stays a layer norm.
        expand: whether what they read has lost its last feature.
    """

    def __init__(
        self,
        module: nn.Module,
        features: tuple[int, ...],
        parameters: list[str],
        expand: bool = False,
    ) -> None:
        self.module, self.features, self.parameters = module, features, parameters
        self.expand = expand
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
        with _RmsNormMode(self.features, known, self.expand):
            return self._forward(*args, **kwargs)


def _parameter(module: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


class _RmsNormMode(TorchFunctionMode):
    def __init__(self, features: tuple[int, ...], known: list[Tensor], expand: bool) -> None:
        super().__init__()
        self.features, self.known, self.expand = features, known, expand

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ARGUMENTS:
            x, shape, weight, bias, eps = _ARGUMENTS[func](*args, **kwargs)
            if tuple(shape) in [(d,) for d in self.features] and self._is_meant(weight, bias):
                rows = expanded(x) if self.expand else x
                y = affine_norm("rms_norm", rows, tuple(shape), weight, bias, eps)
                if func is torch.native_layer_norm:  # it gives the statistics too
                    return y, *func(rows, shape, weight, bias, eps)[1:]
                return y
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


def _group_norm_arguments(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Any, Tensor | None, Tensor | None, float]:
    """Those of the layer norm that it is where it has one group and rows alone; else no shape."""
    rows = num_groups == 1 and input.dim() == 2
    return input, input.shape[1:] if rows else (), weight, bias, eps


#: Functions that are layer norms, with what reads their arguments.
_ARGUMENTS = {
    torch.nn.functional.layer_norm: _layer_norm_arguments,
    torch.layer_norm: _layer_norm_arguments,
    torch.native_layer_norm: _layer_norm_arguments,
    torch.nn.functional.group_norm: _group_norm_arguments,
    torch.group_norm: _group_norm_arguments,
}
