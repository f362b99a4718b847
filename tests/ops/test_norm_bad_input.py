"""What the norms refuse: one clear error that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effkern
from effkern.nn.functional import crms_norm, layer_norm, rms_norm
from tests.support.backends import Backend
from tests.support.norms import Norm, every_norm

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
        (lambda: layer_norm([1.0], (1,)), TypeError, "layer_norm: x must be a tensor"),
        (lambda: layer_norm(X.int(), (8,)), RuntimeError, "layer_norm: x must be float32.*int32"),
        (lambda: layer_norm(X, (7,)), RuntimeError, r"layer_norm: x must end in.*\(7,\)"),
        (lambda: layer_norm(X, ()), RuntimeError, "layer_norm: normalized_shape"),
        (lambda: layer_norm(X, (8,), W[:7]), RuntimeError, "layer_norm: weight must have shape"),
        (lambda: layer_norm(X, (8,), W, W[:7]), RuntimeError, "layer_norm: bias must have shape"),
        (lambda: layer_norm(X, (8,), W, 1.0), TypeError, "layer_norm: bias must be a tensor"),
        (lambda: layer_norm(X, (8,), None, W.int()), RuntimeError, "bias must be float32.*int32"),
        (
            lambda: layer_norm(X, (8,), W, W.to("meta")),
            RuntimeError,
            "layer_norm: bias must be on x's device cpu, got meta",
        ),
        (
            lambda: layer_norm(X, (8,), W, residual=X[:2]),
            RuntimeError,
            "layer_norm: residual must have shape",
        ),
        (lambda: effkern.nn.LayerNorm(8)(torch.ones(4, 7)), RuntimeError, "normalized_shape"),
        (lambda: crms_norm([1.0]), TypeError, "crms_norm: x must be a tensor"),
        (lambda: crms_norm(X.bool()), RuntimeError, "crms_norm: x must be float32.*bool"),
        (lambda: crms_norm(X.to_sparse()), RuntimeError, "crms_norm: x must be a dense tensor"),
        (lambda: crms_norm(torch.tensor(1.0)), RuntimeError, "at least one dimension"),
        (lambda: crms_norm(X, W[:7]), RuntimeError, "crms_norm: weight must have shape"),
        (lambda: crms_norm(X, W.to("meta")), RuntimeError, "crms_norm: weight must be on x's"),
        (
            lambda: crms_norm(X, residual=X.bfloat16()),
            RuntimeError,
            "crms_norm: residual must have x's dtype",
        ),
        (lambda: effkern.nn.CRMSNorm(8)(X), RuntimeError, r"d - 1 = 7 features.*\(4, 8\)"),
        (lambda: effkern.nn.CRMSNorm(1), ValueError, "d must be at least 2"),
        (
            lambda: torch.ops.effkern.add_layer_norm(X, X[:2], (8,)),
            RuntimeError,
            "residual must have shape",
        ),
        (lambda: torch.ops.effkern.crms_norm(X, W[:7]), RuntimeError, "weight must have shape"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_refused(call: Any, kind: type[Exception], message: str, grad: bool) -> None:
    """Whether checked before the kernel is called or, in inference, after it has refused."""
    with torch.set_grad_enabled(grad), pytest.raises(kind, match=message):
        call()


@every_norm
def test_the_inference_kernel_checks_all(backend: Backend, norm: Norm) -> None:
    """Nothing else does before the CPU library's is called."""
    if not backend.name.startswith("cpu"):
        return
    inference = norm.op("inference")
    for weight in (W.int(), W[None], W.to("meta"), torch.ones(1)):
        with pytest.raises(RuntimeError, match="weight"):
            inference(X, weight, None, 1, 1e-5)


@every_norm
def test_the_kernel_ops_defend_themselves(backend: Backend, norm: Norm) -> None:
    """A caller of torch.ops who skips the checks gets an error, not another's memory."""
    if backend.name == "reference":
        return
    overload = backend.name if backend.name in ("simt", "triton") else "default"
    forward, add_forward, backward, inference = (
        norm.op(kind, overload) for kind in ("forward", "add_forward", "backward", "inference")
    )
    x, w = X.to(backend.device), W.to(backend.device)
    kept = torch.ones((norm.numbers, 4)[norm.numbers == 1 :], device=backend.device)
    none, all_, wants = [None] * norm.parameters, [w] * norm.parameters, [True] * norm.parameters
    calls = [
        lambda: forward(x.int(), *none, 1, 1e-5),
        lambda: forward(x, w[:7], *none[1:], 1, 1e-5),
        lambda: forward(x, *all_, 0, 1e-5),
        lambda: forward(x, *all_, 3, 1e-5),
        lambda: inference(x.int(), *none, 1, 1e-5),
        lambda: inference(x, w[:7], *none[1:], 1, 1e-5),
        lambda: inference(x, w, w.double(), 1, 1e-5),
        lambda: inference(x, *all_, 3, 1e-5),
        lambda: add_forward(x, x[:2], *all_, 1, 1e-5),
        lambda: add_forward(x, x.double(), *all_, 1, 1e-5),
        lambda: backward(x[:2], None, x, w, kept, 1, True, *wants),
        lambda: backward(x, None, x, w, kept[..., :2], 1, True, *wants),
        lambda: backward(x, x[:2], x, w, kept, 1, True, *wants),
        lambda: backward(x, None, x, w, kept.double(), 1, True, *wants),
        lambda: backward(x, None, x, None, kept, 1, True, *wants),
        lambda: forward(x, w, w[:7], 1, 1e-5),
        lambda: forward(x, None, w, 1, 1e-5),
        lambda: forward(x, w, w.bfloat16(), 1, 1e-5),
        lambda: backward(x, None, x, w, kept[0], 1, True, *wants),
        lambda: backward(x, None, x, w, kept, 1, True, *wants, True, w[:7]),
        lambda: backward(x, None, x, w, kept, 1, True, *wants, True, w.bfloat16()),
    ]
    for call in calls:
        with pytest.raises(RuntimeError):
            call()
