"""NormSoftmax's Triton kernels: each input byte is read once where rows fit, in one launch."""

from __future__ import annotations

import pytest
import torch

import effkern
from effkern.backends.triton import norm_softmax, norm_softmax_cross_entropy
from effkern.nn.functional import norm_softmax_attention
from tests.support.norm_attention import attention
from tests.triton.interpreter import Counts, counting

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("features", [1, 33, 96, 8192])
def test_rows_that_fit_are_read_once(features: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, features).to(dtype)
    call = None, 1.0, 1e-6, 1
    with counting() as counts:
        norm_softmax.forward(x, None, *call)
    assert counts == Counts(1, x.nbytes, x.nbytes)
    with counting() as counts:
        norm_softmax.forward(x, x > 0, *call)
    assert counts == Counts(1, x.nbytes + x.numel(), x.nbytes)
    with counting() as counts:
        norm_softmax.backward(x, x, x[:1], *call, True, True)
    assert counts == Counts(1, 3 * x.nbytes, x.nbytes + 5 * 4)


def test_longer_rows_are_read_three_times() -> None:
    x = torch.randn(2, 16385)
    call = None, 1.0, 1e-6, 1
    with counting() as counts:
        norm_softmax.forward(x, None, *call)
    assert counts == Counts(1, 3 * x.nbytes, x.nbytes)
    x = torch.randn(2, 8193)
    with counting() as counts:
        norm_softmax.backward(x, x, x, *call, True, False)
    assert counts == Counts(1, 8 * x.nbytes, x.nbytes)


def test_logits_are_read_three_times_and_their_gradient_written_once() -> None:
    logits, target = torch.randn(3, 5000), torch.tensor([0, -100, 4999])
    call = None, None, 1.0, 1e-6, 0.1, -100
    with counting() as counts:
        norm_softmax_cross_entropy.rows(logits, target, *call, torch.ones(()), True, True)
    numbers = 3 * (8 + 4)  # a target and a scale for each row
    assert counts == Counts(1, 3 * logits.nbytes + numbers, logits.nbytes + 3 * 8)


def test_attention_by_its_scores_normalises_them_in_triton() -> None:
    mask = torch.rand(1, 1, 5, 9) > 0.3
    found = []
    for f in (norm_softmax_attention, attention):
        torch.manual_seed(0)
        mine = [torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 9, 9)]
        tau = torch.tensor(0.7, requires_grad=True)
        with effkern.use_backend("triton"), counting() as counts:
            y = f(*mine, attn_mask=mask, tau=tau)
            found.append([y, *torch.autograd.grad(y.square().sum(), (*mine, tau))])
        assert (counts == Counts(0, 0, 0)) == (f is attention)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
