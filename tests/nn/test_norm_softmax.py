"""The layers of NormSoftmax: their arguments, what they hold, and that they call the functions."""

from __future__ import annotations

import copy

import pytest
import torch

import effkern
from effkern.nn.functional import norm_softmax, norm_softmax_cross_entropy


def test_the_layer_is_the_function() -> None:
    x, mask = torch.randn(3, 4, 5), torch.rand(4, 5) > 0.4
    assert torch.equal(effkern.nn.NormSoftmax()(x), norm_softmax(x))
    layer = effkern.nn.NormSoftmax(1, tau=0.3, eps=0.01)
    assert torch.equal(layer(x, mask), norm_softmax(x, 1, tau=0.3, eps=0.01, mask=mask))
    assert repr(layer) == "NormSoftmax(dim=1, tau=0.3, eps=0.01)"
    assert layer.state_dict() == {}


def test_the_loss_is_the_function() -> None:
    x, target, weight = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, -1]), torch.rand(5)
    options = {"label_smoothing": 0.1, "ignore_index": -1, "reduction": "sum"}
    layer = effkern.nn.NormSoftmaxCrossEntropyLoss(0.5, **options, weight=weight, eps=0.01)
    expected = norm_softmax_cross_entropy(x, target, tau=0.5, eps=0.01, weight=weight, **options)
    assert torch.equal(layer(x, target), expected)
    assert "tau=0.5, label_smoothing=0.1, ignore_index=-1, reduction='sum'" in repr(layer)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize(
    "make",
    [effkern.nn.NormSoftmax, effkern.nn.NormSoftmaxCrossEntropyLoss],
    ids=lambda c: c.__name__,
)
def test_tau_is_learned_where_it_is_a_parameter(make: type[torch.nn.Module]) -> None:
    layer = make(tau=torch.nn.Parameter(torch.tensor(0.2)))
    assert [name for name, _ in layer.named_parameters()] == ["tau"]
    assert "tau=learnable" in repr(layer)
    call = (torch.randn(4, 9), torch.zeros(4, dtype=torch.int64))
    result = layer(*call) if "Loss" in make.__name__ else layer(call[0])
    result.square().sum().backward()
    assert layer.tau.grad is not None and layer.tau.grad.abs() > 0
    again = make(tau=torch.nn.Parameter(torch.tensor(1.0)))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.tau, layer.tau)
    assert copy.deepcopy(layer).tau is not layer.tau


def test_another_tensor_becomes_a_buffer() -> None:
    layer = effkern.nn.NormSoftmax(tau=torch.tensor(0.5))
    assert list(layer.state_dict()) == ["tau"] and not list(layer.parameters())
    assert layer.double().tau.dtype == torch.float64


def test_the_loss_may_overwrite_its_logits() -> None:
    leaf, target = torch.randn(4, 9, requires_grad=True), torch.tensor([1, 2, 3, 8])
    logits = leaf * 1
    loss = effkern.nn.NormSoftmaxCrossEntropyLoss(inplace=True)(logits, target)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(grad, logits)
