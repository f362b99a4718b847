"""What NormSoftmax attention refuses: one clear error that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effkern.nn.functional import norm_softmax_attention
from tests.support.backends import Backend

Q = torch.randn(2, 3, 5, 8)
K = torch.randn(2, 3, 7, 8)
MASK = torch.ones(5, 7, dtype=torch.bool)


def call(q: Any = Q, k: Any = K, v: Any = K, **keywords: Any) -> Any:
    return lambda: norm_softmax_attention(q, k, v, **keywords)


@pytest.mark.parametrize(
    ("refused", "kind", "message"),
    [
        (call(q=[1.0]), TypeError, "q must be a tensor"),
        (call(k=None), TypeError, "k must be a tensor"),
        (call(v=3), TypeError, "v must be a tensor"),
        (call(Q.int(), K.int(), K.int()), RuntimeError, "q must be float32.*int32"),
        (call(k=K.double()), RuntimeError, "k must have q's dtype"),
        (call(v=K.bfloat16()), RuntimeError, "v must have q's dtype"),
        (call(k=K.to("meta")), RuntimeError, "k must be on q's device cpu, got meta"),
        (call(q=Q[0, 0, 0]), RuntimeError, "q must have at least 2 dimensions"),
        (call(k=K[..., :4]), RuntimeError, "k must have q's 8 features"),
        (call(v=K[:, :, :3]), RuntimeError, "v must have a row for each of k's 7 keys"),
        (call(k=K[:, :2]), RuntimeError, "must broadcast"),
        (call(Q.to_sparse()), RuntimeError, "q must be a dense tensor"),
        (call(attn_mask=1.0), TypeError, "attn_mask must be a tensor"),
        (call(attn_mask=MASK.int()), RuntimeError, "attn_mask dtype to be bool or float"),
        (call(attn_mask=MASK.double()), RuntimeError, "attn_mask dtype to be bool or float"),
        (call(attn_mask=MASK[:, :6]), RuntimeError, "attn_mask must broadcast"),
        (call(attn_mask=MASK[:4]), RuntimeError, "attn_mask must broadcast"),
        (call(attn_mask=MASK[None, None, None]), RuntimeError, "attn_mask must broadcast"),
        (call(attn_mask=MASK.to("meta")), RuntimeError, "attn_mask must be on q's device"),
        (call(attn_mask=MASK, is_causal=True), RuntimeError, "should not be set when is_causal"),
        (call(dropout_p=1.5), RuntimeError, "dropout probability has to be between 0 and 1"),
        (call(dropout_p=-0.1), RuntimeError, "dropout probability has to be between 0 and 1"),
        (call(dropout_p="a"), TypeError, "dropout_p must be a number"),
        (call(tau=0.0), ValueError, "tau must be above 0"),
        (call(tau=float("nan")), ValueError, "tau must be above 0"),
        (call(tau=torch.ones(2)), RuntimeError, "tau must be a floating number or a tensor of one"),
        (call(tau=None), TypeError, "tau must be a number or a tensor"),
        (call(eps=-1e-6), ValueError, "eps must be at least 0"),
        (call(eps=None), TypeError, "eps must be a number"),
        (call(k=K[:, :2], v=K[:, :2], enable_gqa=True), RuntimeError, "must divide the number"),
        (call(Q[0, 0], K[0, 0], K[0, 0], enable_gqa=True), RuntimeError, "a dimension of heads"),
    ],
)
def test_refused(refused: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        refused()


def test_the_kernel_ops_defend_themselves(backend: Backend) -> None:
    """A caller of torch.ops who skips the checks gets an error, not another's memory."""
    if backend.name.partition("-")[0] != "cpu":
        return
    tau, options = torch.ones(()), (1e-6, 0.3, False)
    forward = torch.ops.effkern._norm_attention_forward.default
    backward = torch.ops.effkern._norm_attention_backward.default
    seen = torch.ones(2, 1, 7, dtype=torch.bool)
    kept = torch.ones(2, 3, 5)
    calls = [
        lambda: forward(Q[0], K[0], None, tau, *options),
        lambda: forward(Q, K[:1], None, tau, *options),
        lambda: forward(Q, K[:, :2], None, tau, *options),
        lambda: forward(Q, K[..., :4], None, tau, *options),
        lambda: forward(Q, K.double(), None, tau, *options),
        lambda: forward(Q.int(), K.int(), None, tau, *options),
        lambda: forward(Q, K, seen[..., :6], tau, *options),
        lambda: forward(Q, K, seen.float(), tau, *options),
        lambda: forward(Q, K, None, tau.double(), *options),
        lambda: forward(Q, K, None, torch.ones(2), *options),
        lambda: backward(Q[:1], None, Q, K, None, kept, tau, *options),
        lambda: backward(Q, K[:1], Q, K, None, kept, tau, *options),
        lambda: backward(Q, None, Q, K, None, kept[:1], tau, *options),
        lambda: backward(Q, None, Q, K, None, kept.double(), tau, *options),
    ]
    for each in calls:
        with pytest.raises(RuntimeError):
            each()
