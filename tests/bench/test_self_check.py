"""The check that `effkern doctor` trusts must notice a backend that is wrong."""

import pytest
import torch

import effkern
from effkern.bench import self_check


def test_the_reference_is_right():
    assert self_check.check("reference", "cpu") == ""


def test_an_unavailable_backend_is_a_finding_and_no_crash():
    assert "unknown effkern backend 'none'" in self_check.check("none", "cpu")


@pytest.mark.parametrize(
    ("broken", "finding"),
    [("forward", "rms_norm forward differs"), ("backward", "rms_norm backward differs")],
)
def test_a_wrong_norm_is_found(monkeypatch, broken, finding):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y + 1 if broken == "forward" else y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad if broken == "forward" else 2 * grad

    right = torch.nn.functional.rms_norm
    monkeypatch.setattr(
        self_check.functional, "rms_norm", lambda *arguments: Wrong.apply(right(*arguments))
    )
    assert self_check.check("reference", "cpu").startswith(finding)


def test_an_optimizer_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setattr(effkern.FusedAdamW, "step", lambda self: None)
    assert self_check.check("reference", "cpu") == "AdamW differs from torch"
