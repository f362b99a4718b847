"""NormSoftmax's CUDA kernels: bytes, launches, every instance, and the order of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.simt import build
from tests.simt.variants import DTYPES, at_offset

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler")


def op(name: str) -> Any:
    """An op of the family, by the CUDA sources."""
    return getattr(torch.ops.effkern, f"_norm_softmax_{name}").simt


def counts(work: Callable[[], object]) -> tuple[int, int, int]:
    """Launches, bytes read and bytes written."""
    simt = build.load()
    simt.reset()
    work()
    seen = simt.counts()
    return seen.launches, seen.read, seen.written


def forward(x: Tensor, mask: Tensor | None = None) -> Callable[[], object]:
    build.load()
    return lambda: op("forward")(x, mask, None, 1.0, 1e-6, 1)


def backward(x: Tensor, mask: Tensor | None = None, tau: bool = False) -> Callable[[], object]:
    build.load()
    return lambda: op("backward")(x, x, mask, None, 1.0, 1e-6, 1, True, tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [1, 24, 33, 296, 8192])
def test_held_rows_are_read_once(features: int, dtype: torch.dtype) -> None:
    rows = 3
    x = torch.randn(rows, features).to(dtype)
    tensor = x.nbytes
    assert counts(forward(x)) == (1, tensor, tensor)
    assert counts(backward(x)) == (1, 2 * tensor, tensor)
    assert counts(backward(x, tau=True)) == (1, 2 * tensor, tensor + 4 * rows)
    visible = x > 0
    assert counts(forward(x, visible)) == (1, tensor + rows * features, tensor)
    # What is broadcast is read for each row, from cache.
    assert counts(forward(x, x[:1])) == (1, 2 * tensor, tensor)
    assert counts(backward(x, x.float())) == (1, 2 * tensor + rows * features * 4, tensor)


@pytest.mark.parametrize("features", [16385, 16388])
def test_longer_rows_are_read_three_times(features: int) -> None:
    x = torch.randn(2, features)
    assert counts(forward(x[:, :-5])) == (1, 2 * (features - 5) * 4, 2 * (features - 5) * 4)
    assert counts(forward(x)) == (1, 3 * x.nbytes, x.nbytes)
    assert counts(backward(x)) == (1, 5 * x.nbytes, x.nbytes)
    assert counts(forward(x, x > 0)) == (1, 3 * (x.nbytes + x.numel()), x.nbytes)


@pytest.mark.parametrize("classes", [40, 300, 5000])
def test_logits_are_read_three_times_and_their_gradient_written_once(classes: int) -> None:
    rows = 2
    logits, target = torch.randn(rows, classes), torch.tensor([0, classes - 1])
    one = torch.ones(())
    call = None, None, 1.0, 1e-6, 0.1, -100
    build.load()
    _, read, written = counts(
        lambda: op("cross_entropy")(logits, target, *call, None, False, False)
    )
    threads = min(-(-(classes // 4) // 32) * 32, 1024)
    # Each thread of a row reads the row's target, and its scale.
    assert (read, written) == (2 * logits.nbytes + rows * threads * 8, rows * 4)
    launches, read, written = counts(
        lambda: op("cross_entropy")(logits, target, *call, one, True, True)
    )
    assert launches == 1
    assert read == 3 * logits.nbytes + rows * threads * (8 + 4)
    assert written == logits.nbytes + rows * 8


def instances(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Calls that run each kernel of the dtype, with and without 16-byte accesses."""
    for features in (8, 9, 16400, 16401):
        x = torch.randn(1, features).to(dtype)
        yield forward(x)
        yield forward(x, x)
        yield backward(x)
        target, one = torch.zeros(1, dtype=torch.int64), torch.ones(())
        one = one.double() if dtype == torch.float64 else one
        call = None, None, 1.0, 1e-6, 0.0, -100, one, True, False
        yield lambda x=x, target=target, call=call: op("cross_entropy")(x, target, *call)


#: How many kernels `instances` runs: two, aligned or not, of rows held without and with an additive
#: mask, of long ones, of both in the backward pass, and of the cross-entropy.
INSTANCES = 2 * (3 + 2 + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_any_address(dtype: torch.dtype, offset: int) -> None:
    """As the reference: rows of several to a warp, of several warps, and long ones."""
    build.load()
    for rows, features in ((9, 24), (3, 296), (1, 16400)):
        x, grad, bias = (at_offset(torch.randn(rows, features).to(dtype), offset) for _ in range(3))
        visible = at_offset(torch.rand(rows, features) > 0.3, offset)
        for mask in (None, visible, bias):
            outputs = []
            for overload in ("simt", "reference"):
                ops = torch.ops.effkern
                call = x, mask, None, 1.0, 1e-6, 1
                y = getattr(ops._norm_softmax_forward, overload)(*call)
                grads = getattr(ops._norm_softmax_backward, overload)(grad, *call, True, True)
                outputs.append([y, *grads])
            eps = torch.finfo(dtype).eps
            for actual, expected in zip(*outputs, strict=True):
                torch.testing.assert_close(actual, expected, rtol=64 * eps, atol=32 * eps)


def test_the_order_of_threads_and_blocks_changes_nothing() -> None:
    simt = build.load()
    for rows, features in ((30, 24), (9, 700), (3, 16400)):
        x = torch.randn(rows, features)
        target, one = torch.zeros(rows, dtype=torch.int64), torch.ones(())
        results = []
        for seed in range(3):
            simt.seed(seed)
            y = op("forward")(x, x, None, 1.0, 1e-6, 1)
            grads = op("backward")(x, x, None, None, 1.0, 1e-6, 1, True, True)
            call = None, None, 1.0, 1e-6, 0.1, -100, one, True, True
            results.append([y, *grads, *op("cross_entropy")(x, target, *call)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_in_place_is_as_out_of_place() -> None:
    build.load()
    for classes in (30, 40, 5000):
        logits, target = torch.randn(3, classes), torch.tensor([1, -100, classes - 1])
        call = target, None, None, 1.0, 1e-6, 0.1, -100, torch.ones(())
        loss, grad, shares = op("cross_entropy")(logits, *call, True, True)
        again = op("cross_entropy_")(logits, *call, True)
        assert all(map(torch.equal, (loss, shares, grad), (*again, logits)))
