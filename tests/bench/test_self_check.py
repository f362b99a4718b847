"""The check that `effkern doctor` trusts must notice a backend that is wrong."""

import dataclasses

import pytest
import torch

import effkern
from effkern.bench import self_check
from effkern.bench.norms import NORMS
from effkern.bench.peers import EAGER_NORMS


def test_the_reference_is_right():
    assert self_check.check("reference", "cpu") == ""


def test_an_unavailable_backend_is_a_finding_and_no_crash():
    assert "unknown effkern backend 'none'" in self_check.check("none", "cpu")


@pytest.mark.parametrize("broken", ["forward", "backward"])
@pytest.mark.parametrize("name", list(EAGER_NORMS))
def test_a_wrong_norm_is_found(monkeypatch, name, broken):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y + 1 if broken == "forward" else y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad if broken == "forward" else 2 * grad

    right = NORMS[name]

    def function(x, parameters, residual):
        return (Wrong.apply(*right.function(x, parameters, residual)),)

    monkeypatch.setitem(NORMS, name, dataclasses.replace(right, function=function))
    assert self_check.check("reference", "cpu").startswith(f"{name} {broken} differs")


def test_an_optimizer_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setattr(effkern.FusedAdamW, "step", lambda self: None)
    assert self_check.check("reference", "cpu") == "AdamW differs from torch"
