"""What a converted model is made of: the norm with a bias is one pass, with all its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from effkern.convert.runtime import BiasedRMSNorm


def made(weight: bool, bias: bool, dtype: torch.dtype = torch.float32) -> BiasedRMSNorm:
    norm = BiasedRMSNorm(24, eps=1e-5, elementwise_affine=weight, dtype=dtype)
    norm.bias = torch.nn.Parameter(torch.randn(24).to(dtype)) if bias else None
    if weight:
        torch.nn.init.normal_(norm.weight)
    return norm


def centred(*shape: int) -> Tensor:
    x = torch.randn(shape)
    return x - x.mean(-1, keepdim=True)


class Ops(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_norm_of_centred_rows(weight: bool, bias: bool) -> None:
    norm, x = made(weight, bias), centred(5, 3, 24).requires_grad_()
    parameters = list(norm.parameters())
    y = norm(x)
    expected = torch.nn.functional.layer_norm(x, (24,), norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(y, expected)
    if parameters:
        grad = torch.randn_like(y)
        torch.testing.assert_close(
            *(torch.autograd.grad(out, parameters, grad) for out in (y, expected))
        )


def test_weight_and_bias_are_one_kernel() -> None:
    norm, x = made(True, True), centred(5, 24)
    with torch.no_grad(), Ops() as ops:
        norm(x)
    assert ops.seen == ["effkern._rms_norm_inference.default"]


def test_in_bfloat16_it_is_rounded_once() -> None:
    norm, x = made(True, True, torch.bfloat16), centred(400, 24).bfloat16()
    wide = torch.nn.functional.rms_norm(x.double(), (24,), norm.weight.double(), 1e-5)
    exact = (wide + norm.bias.double()).bfloat16()
    # All but the rare value that float32 carries over the middle between two.
    assert (norm(x) != exact).float().mean() < 1e-3


def test_torch_fx_stops_at_it() -> None:
    norm, x = made(True, True), centred(5, 24)
    assert torch.equal(torch.fx.symbolic_trace(norm)(x), norm(x))
