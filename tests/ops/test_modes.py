"""The functions of `effkern.ops` under forward-mode autograd, on fake and on meta tensors, and
traced by make_fx.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from effkern.nn import NormSoftmaxAttention
from effkern.nn import functional as effkern_functional


def cross_entropy(x: Tensor) -> Tensor:
    """Of the classes that x itself tells, so that they are where x is."""
    target = x.new_zeros(x.shape[:1], dtype=torch.int64)
    return 2 * effkern_functional.norm_softmax_cross_entropy(x, target)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: effkern_functional.rms_norm(x, x.shape[-1:]),
    "layer_norm": lambda x: effkern_functional.layer_norm(x, x.shape[-1:]),
    "crms_norm": lambda x: effkern_functional.crms_norm(x),
    "norm_softmax": lambda x: effkern_functional.norm_softmax(x),
    "norm_softmax_cross_entropy": cross_entropy,
    "norm_softmax_attention": lambda x: effkern_functional.norm_softmax_attention(x, x, x),
}
every_function = pytest.mark.parametrize("name", list(FUNCTIONS))


@every_function
def test_forward_mode_autograd(name: str) -> None:
    """Of torch.autograd, without torch.func."""
    x, tangent = torch.randn(2, 4, 6, dtype=torch.float64)
    _, expected = torch.func.jvp(FUNCTIONS[name], (x,), (tangent,))
    for requires_grad in (False, True):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.requires_grad_(requires_grad), tangent)
            _, found = torch.autograd.forward_ad.unpack_dual(FUNCTIONS[name](dual))
            assert found is not None
            torch.testing.assert_close(found, expected)


@every_function
def test_many_gradients_in_one_backward_pass(name: str) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    mine, one_by_one = (
        torch.autograd.functional.jacobian(FUNCTIONS[name], x, vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(mine, one_by_one)


@every_function
def test_without_numbers(name: str) -> None:
    with FakeTensorMode():
        fake = torch.randn(4, 6, requires_grad=True)
        FUNCTIONS[name](fake).sum().backward()
    meta = torch.randn(4, 6, device="meta", requires_grad=True)
    FUNCTIONS[name](meta).sum().backward()
    assert fake.grad is not None
    assert meta.grad is not None
    assert fake.grad.shape == meta.grad.shape == (4, 6)


@every_function
def test_make_fx(name: str) -> None:
    x, y = torch.randn(2, 4, 6)
    torch.testing.assert_close(make_fx(FUNCTIONS[name])(x)(y), FUNCTIONS[name](y))


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_layer_on_meta(need_weights: bool) -> None:
    layer, x = NormSoftmaxAttention(8, 2, device="meta"), torch.randn(3, 2, 8, device="meta")
    assert layer(x, x, x, need_weights=need_weights)[0].shape == (3, 2, 8)
