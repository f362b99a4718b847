"""effkern.nn.NormSoftmaxAttention beside torch.nn.MultiheadAttention."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effkern
from effkern.nn import NormSoftmaxAttention

HIDDEN = torch.triu(torch.ones(10, 10, dtype=torch.bool), 1)
PADDING = torch.zeros(3, 10, dtype=torch.bool)
PADDING[1, 4:] = True


def additive(mask: Tensor) -> Tensor:
    return torch.where(mask, float("-inf"), 0.0)


def inputs(layer: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(3, 10, n) for n in (layer.embed_dim, layer.kdim, layer.vdim))
    return (q, k, v) if layer.batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 20}, {"bias": False}])
def test_with_a_divisor_of_one_it_is_torchs(batch_first: bool, sizes: dict[str, Any]) -> None:
    """The same parameters, masks, results, probabilities and gradients."""
    mine = NormSoftmaxAttention(32, 4, batch_first=batch_first, **sizes)
    stock = nn.MultiheadAttention(32, 4, batch_first=batch_first, **sizes)
    stock.load_state_dict(mine.state_dict())
    mine.tau, mine.eps = 1e-30, 1.0
    q, k, v = inputs(mine)
    masks = itertools.product(
        (None, HIDDEN, HIDDEN.expand(12, 10, 10)), (None, PADDING), (False, True), (False, True)
    )
    for mask, padding, floating, average in masks:
        keywords = {
            "attn_mask": additive(mask) if floating and mask is not None else mask,
            "key_padding_mask": additive(padding) if floating and padding is not None else padding,
            "average_attn_weights": average,
        }
        (y, w), (stock_y, stock_w) = (layer(q, k, v, **keywords) for layer in (mine, stock))
        torch.testing.assert_close(y, stock_y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(w, stock_w, rtol=1e-4, atol=1e-5)
        y, w = mine(q, k, v, need_weights=False, **keywords)
        assert w is None
        torch.testing.assert_close(y, stock_y, rtol=1e-4, atol=1e-5)
        parameters = list(mine.parameters()), list(stock.parameters())
        gradients = (
            torch.autograd.grad(out.square().sum(), p)
            for out, p in zip((y, stock_y), parameters, strict=True)
        )
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("floating", [False, True])
def test_with_and_without_weights(floating: bool) -> None:
    """What is computed without scores is what the scores give; is_causal too."""
    layer = NormSoftmaxAttention(32, 4, batch_first=True, tau=0.6)
    x = torch.randn(3, 10, 32)
    form = additive if floating else lambda mask: mask
    for mask, padding in itertools.product((None, HIDDEN), (None, PADDING)):
        keywords: dict[str, Any] = {
            "attn_mask": None if mask is None else form(mask),
            "key_padding_mask": None if padding is None else form(padding),
        }
        y, w = layer(x, x, x, **keywords)
        torch.testing.assert_close(w.sum(-1), torch.ones(3, 10))
        for causal in {False, mask is not None}:
            bare, none = layer(x, x, x, need_weights=False, is_causal=causal, **keywords)
            assert none is None
            torch.testing.assert_close(bare, y, rtol=1e-4, atol=1e-5)


def test_without_a_batch() -> None:
    for batch_first in (False, True):
        layer = NormSoftmaxAttention(32, 4, batch_first=batch_first)
        x = torch.randn(10, 32)
        y, w = layer(x, x, x, key_padding_mask=PADDING[1])
        assert y.shape == (10, 32) and w.shape == (10, 10)
        batch = x[None] if batch_first else x[:, None]
        many, _ = layer(batch, batch, batch, key_padding_mask=PADDING[1:2])
        torch.testing.assert_close(many.reshape(10, 32), y)


def test_a_batch_entry_that_is_all_padding_gives_the_output_bias() -> None:
    layer = NormSoftmaxAttention(32, 4, batch_first=True)
    x = torch.randn(3, 10, 32)
    padding = PADDING.clone()
    padding[2] = True
    nn.init.normal_(layer.out_proj.bias)
    for need_weights in (False, True):
        y, w = layer(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        torch.testing.assert_close(y[2], layer.out_proj.bias.expand(10, 32))
        assert w is None or not w[2].any()


@pytest.mark.parametrize("need_weights", [False, True])
def test_tau_is_learned(need_weights: bool) -> None:
    tau = nn.Parameter(torch.tensor(0.01))
    layer = NormSoftmaxAttention(32, 4, batch_first=True, tau=tau)
    assert "tau" in layer.state_dict()
    x = torch.randn(3, 10, 32)
    layer(x, x, x, need_weights=need_weights)[0].square().sum().backward()
    assert tau.grad is not None and tau.grad != 0
    assert copy.deepcopy(layer).tau.grad_fn is None
    held = NormSoftmaxAttention(32, 4, tau=torch.tensor(0.5))
    assert "tau" in dict(held.named_buffers())


def test_dropout_in_training_alone() -> None:
    layer = NormSoftmaxAttention(32, 4, dropout=0.5, batch_first=True)
    x = torch.randn(3, 10, 32)
    for need_weights in (False, True):
        layer.train()
        a, b = (layer(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(a, b)
        layer.eval()
        a, b = (layer(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert torch.equal(a, b)


def test_autocast_and_half() -> None:
    layer = NormSoftmaxAttention(32, 4, batch_first=True)
    x = torch.randn(3, 10, 32)
    y, _ = layer(x, x, x)
    for need_weights in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half, _ = layer(x, x, x, need_weights=need_weights, key_padding_mask=PADDING & False)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.02)
        narrow = copy.deepcopy(layer).bfloat16()
        n = x.bfloat16()
        assert narrow(n, n, n, need_weights=need_weights)[0].dtype == torch.bfloat16


def test_compiled_in_one_graph() -> None:
    layer = NormSoftmaxAttention(32, 4, batch_first=True)
    x = torch.randn(3, 10, 32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: layer(t, t, t, need_weights=False, attn_mask=HIDDEN, is_causal=True)[0],
        fullgraph=True,
    )
    mine, eager = compiled(x), layer(x, x, x, attn_mask=HIDDEN)[0]
    torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)
    mine.sum().backward()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: NormSoftmaxAttention(32, 4, add_bias_kv=True), NotImplementedError, "add_bias_kv"),
        (lambda: NormSoftmaxAttention(32, 4, add_zero_attn=True), NotImplementedError, "zero"),
        (lambda: NormSoftmaxAttention(32, 5), AssertionError, "divisible"),
        (lambda: NormSoftmaxAttention(32, 4, tau=0.0), ValueError, "tau must be above 0"),
        (lambda: NormSoftmaxAttention(32, 4, tau="1"), TypeError, "tau must be a number"),
        (lambda: NormSoftmaxAttention(32, 4, eps=-1.0), ValueError, "eps must be at least 0"),
        (lambda: call(is_causal=True), RuntimeError, "Need attn_mask"),
        (lambda: call(attn_mask=HIDDEN[:4]), RuntimeError, "attn_mask must have shape"),
        (lambda: call(attn_mask=HIDDEN.int()), RuntimeError, "attn_mask dtype"),
        (lambda: call(key_padding_mask=PADDING[:, :4]), RuntimeError, "key_padding_mask must have"),
        (lambda: call(attn_mask=[1]), TypeError, "attn_mask must be a tensor or None, got list"),
        (lambda: call(key_padding_mask=3), TypeError, "key_padding_mask must be a tensor or None"),
        (lambda: call(key=None), TypeError, "key must be a tensor, got NoneType"),
        (lambda: call(value=torch.randn(3, 10, 8)), RuntimeError, "value must have 32 features"),
        (lambda: call(key=torch.randn(10, 32)), RuntimeError, "must all have 3 dimensions"),
        (
            lambda: call(key=torch.randn(1, 10, 32), value=torch.randn(1, 10, 32)),
            RuntimeError,
            "must have the same batch size",
        ),
    ],
)
def test_refused(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def call(**keywords: Any) -> None:
    x = torch.randn(3, 10, 32)
    given = {"query": x, "key": x, "value": x} | keywords
    NormSoftmaxAttention(32, 4, batch_first=True)(**given)


def test_its_name_is_public() -> None:
    assert effkern.nn.NormSoftmaxAttention is NormSoftmaxAttention
    assert "tau" in repr(NormSoftmaxAttention(32, 4))
