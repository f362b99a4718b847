"""The family of norms under test: each with what a user of stock PyTorch writes for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.nn.functional import crms_norm, layer_norm, rms_norm
from effkern.ops.norm import affine_norm

Parameters = Sequence[Tensor | None]


@dataclass(frozen=True)
class Norm:
    """One member of the family, with a weight and a bias.

    Attributes:
        name: of the function and of its ops.
        public_parameters: how many of them its public function takes; with a bias that it does not
            take, `affine_norm` is called.
        numbers: how many a row the kernels keep for the backward pass.
        many_dims: whether several dimensions can be normalised together.
        function: effkern's, called with x, the number of dimensions, the parameters, eps, residual.
        eager: in stock PyTorch, called with what is normalised, dimensions, parameters and eps.
        centred: whether it takes the mean off.
    """

    name: str
    public_parameters: int
    numbers: int
    many_dims: bool
    function: Callable[..., Any]
    eager: Callable[[Tensor, int, Parameters, float], Tensor]
    centred: bool = False
    parameters: ClassVar[int] = 2

    def __str__(self) -> str:
        return self.name

    def __call__(
        self,
        x: Tensor,
        *parameters: Tensor | None,
        dims: int = 1,
        eps: float | None = 1e-5,
        residual: Tensor | None = None,
    ) -> Any:
        """Effkern's."""
        padded = [*parameters, None, None][: self.parameters]
        if any(parameter is not None for parameter in padded[self.public_parameters :]):
            return affine_norm(self.name, x, _shape(x, dims), *padded, eps, residual)
        return self.function(x, dims, padded[: self.public_parameters], eps, residual)

    def op(self, kind: str, overload: str = "default") -> Any:
        """The kernel op: "forward", "add_forward", "backward" or "inference"."""
        name = f"_add_{self.name}_forward" if kind == "add_forward" else f"_{self.name}_{kind}"
        return getattr(getattr(torch.ops.effkern, name), overload)

    def rstd(self, x: Tensor, dims: int, eps: float) -> Tensor:
        """What the row is multiplied by."""
        last = list(range(-dims, 0))
        if self.centred:
            return (x.var(last, correction=0) + eps).rsqrt()
        squares, d = x.square().sum(last), x.shape[-dims:].numel()
        if self.name == "crms_norm":
            squares, d = squares + x.sum(last).square(), d + 1
        return (squares / max(d, 1) + eps).rsqrt()

    def random_parameters(self, shape: Sequence[int], **options: Any) -> list[Tensor]:
        """A weight around one, and a bias around zero."""
        return [torch.rand(shape, **options) + 0.5, torch.randn(shape, **options)]


def _shape(x: Tensor, dims: int) -> torch.Size:
    return x.shape[x.dim() - dims :]


def _eager_rms_norm(x: Tensor, dims: int, parameters: Parameters, eps: float) -> Tensor:
    weight, bias = parameters
    y = F.rms_norm(x, _shape(x, dims), weight, eps)
    return y if bias is None else (y + bias).to(x.dtype)


def _eager_crms_norm(x: Tensor, dims: int, parameters: Parameters, eps: float) -> Tensor:
    """As torch's rms_norm does it: in the accumulation dtype, rounded once."""
    wide = x.to(accumulation_dtype(x.dtype))
    squares = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
    y = wide * torch.rsqrt(squares / (x.shape[-1] + 1) + eps)
    weight, bias = parameters
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _eager_layer_norm(x: Tensor, dims: int, parameters: Parameters, eps: float) -> Tensor:
    weight, bias = parameters
    if all(p is None or p.dtype == x.dtype for p in parameters):
        return F.layer_norm(x, _shape(x, dims), weight, bias, eps)
    acc = accumulation_dtype(x.dtype)  # torch takes few mixtures of dtypes
    wide = [None if t is None else t.to(acc) for t in (x, weight, bias)]
    return F.layer_norm(wide[0], _shape(x, dims), *wide[1:], eps).to(x.dtype)


RMS = Norm(
    "rms_norm",
    1,
    1,
    True,
    lambda x, dims, p, eps, residual: rms_norm(x, _shape(x, dims), *p, eps, residual=residual),
    _eager_rms_norm,
)
CRMS = Norm(
    "crms_norm",
    1,
    2,
    False,
    lambda x, dims, p, eps, residual: crms_norm(x, *p, eps, residual=residual),
    _eager_crms_norm,
)
LAYER = Norm(
    "layer_norm",
    2,
    2,
    True,
    lambda x, dims, p, eps, residual: layer_norm(x, _shape(x, dims), *p, eps, residual=residual),
    _eager_layer_norm,
    centred=True,
)
NORMS = (RMS, CRMS, LAYER)
every_norm = pytest.mark.parametrize("norm", NORMS, ids=str)
