"""What NormSoftmax refuses: one clear error that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effkern.nn.functional import norm_softmax
from tests.support.backends import Backend

X = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: norm_softmax(X.int()), RuntimeError, "x must be float32.*int32"),
        (lambda: norm_softmax(X.bool()), RuntimeError, "x must be float32.*bool"),
        (lambda: norm_softmax(X.to(torch.complex64)), RuntimeError, "x must be float32.*complex"),
        (lambda: norm_softmax([1.0, 2.0]), TypeError, "x must be a tensor, got list"),
        (lambda: norm_softmax(X.to_sparse()), RuntimeError, "x must be a dense tensor"),
        (lambda: norm_softmax(X, 2), IndexError, "dim must be a dimension of x, -2 to 1, got 2"),
        (lambda: norm_softmax(X, -3), IndexError, "dim must be .*got -3"),
        (lambda: norm_softmax(X, 1.0), TypeError, "dim must be an int, got float"),
        (lambda: norm_softmax(X, tau=0.0), ValueError, "tau must be above 0, got 0.0"),
        (lambda: norm_softmax(X, tau=-1), ValueError, "tau must be above 0, got -1"),
        (lambda: norm_softmax(X, tau=float("nan")), ValueError, "tau must be above 0, got nan"),
        (lambda: norm_softmax(X, tau="1"), TypeError, "tau must be a number or a tensor, got str"),
        (lambda: norm_softmax(X, tau=None), TypeError, "tau must be a number or a tensor"),
        (lambda: norm_softmax(X, tau=torch.ones(2)), RuntimeError, r"tau must be .*got shape \(2,"),
        (lambda: norm_softmax(X, tau=torch.tensor(1)), RuntimeError, "tau must be .*int64"),
        (lambda: norm_softmax(X, eps=-1e-6), ValueError, "eps must be at least 0, got -1e-06"),
        (lambda: norm_softmax(X, eps=None), TypeError, "eps must be a number, got NoneType"),
        (lambda: norm_softmax(X, mask=1), TypeError, "mask must be a tensor or None, got int"),
        (lambda: norm_softmax(X, mask=X.int()), RuntimeError, "mask must be bool, .*int32"),
        (
            lambda: norm_softmax(X, mask=X[:3] > 0),
            RuntimeError,
            r"mask must be broadcastable to x's shape \(4, 8\), got \(3, 8\)",
        ),
        (lambda: norm_softmax(X, mask=X[None] > 0), RuntimeError, r"mask .*got \(1, 4, 8\)"),
        (lambda: norm_softmax(X[:1], mask=X > 0), RuntimeError, r"mask .*\(1, 8\), got \(4, 8\)"),
        (lambda: norm_softmax(X, mask=(X > 0).to("meta")), RuntimeError, "mask must be on x's dev"),
        (
            lambda: norm_softmax(X, mask=(X > 0).to_sparse()),
            RuntimeError,
            "mask must be a dense tensor",
        ),
    ],
)
def test_refused(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^norm_softmax: {message}"):
        call()


def test_kernels_refuse_too(backend: Backend) -> None:
    """What only a direct call of the ops can get wrong."""
    if backend.name == "reference":
        return
    name = {"cpu": "default", "cuda": "default"}.get(backend.name.split("-")[0], backend.name)
    forward, backward = (
        getattr(getattr(torch.ops.effkern, f"_norm_softmax_{kind}"), name)
        for kind in ("forward", "backward")
    )
    x = X.to(backend.device)
    for call, message in (
        (lambda: forward(x, None, None, 1.0, 1e-6, 2), "dim is 2"),
        (lambda: forward(x.int(), None, None, 1.0, 1e-6, 1), "x has dtype"),
        (lambda: forward(x, x.int(), None, 1.0, 1e-6, 1), "mask"),
        (lambda: forward(x, x.double(), None, 1.0, 1e-6, 1), "mask must be bool"),
        (lambda: forward(x, x[:3], None, 1.0, 1e-6, 1), "mask|expand"),
        (lambda: forward(x, None, x[0].double(), 1.0, 1e-6, 1), "tau must be one number"),
        (lambda: backward(x[:3], x, None, None, 1.0, 1e-6, 1, True, True), "grad has shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
