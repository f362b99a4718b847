"""What RMSNorm refuses: one clear error that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effkern
from effkern.nn.functional import rms_norm
from tests.support.backends import Backend

X, W = torch.randn(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: rms_norm(torch.ones(4, 8, dtype=torch.int32), (8,)),
            RuntimeError,
            "x must be float32.*int32",
        ),
        (
            lambda: rms_norm(torch.ones(4, 8, dtype=torch.bool), (8,)),
            RuntimeError,
            "x must be float32.*bool",
        ),
        (
            lambda: rms_norm(torch.ones(4, 8, dtype=torch.complex64), (8,)),
            RuntimeError,
            "x must be float32.*complex",
        ),
        (lambda: rms_norm([1.0, 2.0], (2,)), TypeError, "x must be a tensor"),
        (lambda: rms_norm(X, (7,)), RuntimeError, r"normalized_shape=\(7,\).*\(4, 8\)"),
        (lambda: rms_norm(X, (2, 4, 8)), RuntimeError, r"normalized_shape=\(2, 4, 8\)"),
        (lambda: rms_norm(X, ()), RuntimeError, "normalized_shape"),
        (lambda: rms_norm(torch.tensor(1.0), (1,)), RuntimeError, "normalized_shape"),
        (
            lambda: rms_norm(X, (8,), torch.ones(7)),
            RuntimeError,
            r"weight must have shape \(8,\), got \(7,\)",
        ),
        (lambda: rms_norm(X, (8,), torch.ones(4, 8)), RuntimeError, "weight must have shape"),
        (
            lambda: rms_norm(X, (8,), torch.ones(8, dtype=torch.int64)),
            RuntimeError,
            "weight must be float32.*int64",
        ),
        (lambda: rms_norm(X, (8,), 1.0), TypeError, "weight must be a tensor"),
        (
            lambda: rms_norm(X, (8,), W.to("meta")),
            RuntimeError,
            "weight must be on x's device cpu, got meta",
        ),
        (
            lambda: rms_norm(X, (8,), W, residual=torch.ones(3, 8)),
            RuntimeError,
            "residual must have shape",
        ),
        (
            lambda: rms_norm(X, (8,), W, residual=X.bfloat16()),
            RuntimeError,
            "residual must have x's dtype",
        ),
        (
            lambda: rms_norm(X, (8,), W, residual=X.to("meta")),
            RuntimeError,
            "residual must be on x's device",
        ),
        (lambda: rms_norm(X, (8,), W, residual=1), TypeError, "residual must be a tensor"),
        (lambda: rms_norm(X.to_sparse(), (8,)), RuntimeError, "x must be a dense tensor"),
        (lambda: rms_norm(X, (8,), W.to_sparse()), RuntimeError, "weight must be a dense tensor"),
        (lambda: torch.ops.effkern.rms_norm(X, (7,)), RuntimeError, "normalized_shape"),
        (
            lambda: torch.ops.effkern.add_rms_norm(X, X[:2], (8,)),
            RuntimeError,
            "residual must have shape",
        ),
        (lambda: effkern.nn.RMSNorm(8)(torch.ones(4, 7)), RuntimeError, "normalized_shape"),
    ],
)
def test_refused(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_the_kernel_ops_defend_themselves(backend: Backend) -> None:
    """A caller of torch.ops who skips the checks gets an error, not another's memory."""
    if backend.name == "reference":
        return
    name = backend.name if backend.name in ("simt", "triton") else "default"
    forward = getattr(torch.ops.effkern._rms_norm_forward, name)
    add_forward = getattr(torch.ops.effkern._add_rms_norm_forward, name)
    backward = getattr(torch.ops.effkern._rms_norm_backward, name)
    x, w = X.to(backend.device), W.to(backend.device)
    rstd = torch.ones(4, device=backend.device)
    for call in (
        lambda: forward(x.int(), None, 1, 1e-5),
        lambda: forward(x, w[:7], 1, 1e-5),
        lambda: forward(x, w, 0, 1e-5),
        lambda: forward(x, w, 3, 1e-5),
        lambda: add_forward(x, x[:2], w, 1, 1e-5),
        lambda: add_forward(x, x.double(), w, 1, 1e-5),
        lambda: backward(x[:2], None, x, w, rstd, 1, True, True),
        lambda: backward(x, None, x, w, rstd[:2], 1, True, True),
        lambda: backward(x, x[:2], x, w, rstd, 1, True, True),
        lambda: backward(x, None, x, w, rstd.double(), 1, True, True),
    ):
        with pytest.raises(RuntimeError):
            call()
