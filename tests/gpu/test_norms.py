"""Norms on a GPU: graphs, streams, launches, autocast, compiled, sizes past 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effkern.nn import functional
from tests.gpu.test_optimizers import kernels_of, no_waiting
from tests.support.norms import LAYER, RMS, Norm, every_norm

ROWS, FEATURES = 64, 768


def leaves(norm: Norm, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(ROWS, FEATURES, dtype=dtype, device="cuda")
    parameters = norm.random_parameters((FEATURES,), dtype=dtype, device="cuda")
    return [t.requires_grad_() for t in (x, *parameters)]


def exact(norm: Norm, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The value and all gradients, in float64."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y = norm.eager(wide[0], 1, wide[1:], 1e-5)
    return [y, *torch.autograd.grad(y, wide, grad.double())]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-5, atol=2e-5)


@every_norm
def test_forward_and_backward_in_a_graph(gpu_backend: str, norm: Norm) -> None:
    tensors = leaves(norm)
    grad = torch.randn(ROWS, FEATURES, device="cuda")

    def run() -> list[Tensor]:
        y = norm(*tensors)
        return [y, *torch.autograd.grad(y, tensors, grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn_like(t))
        grad.copy_(torch.randn_like(grad))
    graph.replay()
    assert_close(captured, exact(norm, tensors, grad))


@every_norm
def test_launches_without_waiting(gpu_backend: str, norm: Norm) -> None:
    """One forward; one backward, and one more for the sums over rows."""
    tensors = leaves(norm)
    grad = torch.randn(ROWS, FEATURES, device="cuda")
    torch.autograd.grad(norm(*tensors), tensors, grad)
    with no_waiting():
        y = norm(*tensors)
        torch.autograd.grad(y, tensors, grad)
    y = norm(*tensors)
    forward = kernels_of(lambda: norm(*tensors))
    assert len(forward) == 1, forward
    backward = kernels_of(lambda: torch.autograd.grad(y, tensors, grad))
    assert len(backward) <= 2, backward


@every_norm
def test_the_current_stream(gpu_backend: str, norm: Norm) -> None:
    tensors = leaves(norm)
    x = tensors[0].detach()
    norm(*tensors)
    stream, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy / 64
        late.copy_(x)
        y = norm(late, *tensors[1:])
    stream.synchronize()
    assert torch.equal(y, norm(*tensors))


@every_norm
def test_results_do_not_change_between_runs(gpu_backend: str, norm: Norm) -> None:
    x = torch.randn(5000, 515, device="cuda", requires_grad=True)
    parameters = [p.requires_grad_() for p in norm.random_parameters((515,), device="cuda")]
    grad = torch.randn_like(x)

    def run() -> list[Tensor]:
        y = norm(x, *parameters)
        return [y, *torch.autograd.grad(y, [x, *parameters], grad)]

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, run(), first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [RMS, LAYER], ids=str)
def test_autocast_as_torch(
    gpu_backend: str, norm: Norm, given: torch.dtype, dtype: torch.dtype
) -> None:
    x, *parameters = leaves(norm, given)
    with torch.autocast("cuda", dtype=dtype):
        mine = norm(x, *parameters)
        theirs = norm.eager(x, 1, parameters, 1e-5)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


@every_norm
def test_compiled(gpu_backend: str, norm: Norm) -> None:
    torch._dynamo.reset()
    tensors = leaves(norm)
    grad = torch.randn(ROWS, FEATURES, device="cuda")
    y = torch.compile(norm, fullgraph=True)(*tensors)
    assert_close([y, *torch.autograd.grad(y, tensors, grad)], exact(norm, tensors, grad))


def test_more_elements_than_32_bits_count(gpu_backend: str) -> None:
    rows, features = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 8 * rows * features:
        pytest.skip("needs memory for three tensors of 2^31 bfloat16 elements")
    x = torch.ones(rows, features, dtype=torch.bfloat16, device="cuda")
    x[-2:] = torch.randn(2, features, device="cuda")
    y = functional.rms_norm(x, (features,), None, 1e-6)
    torch.testing.assert_close(y[-2:], F.rms_norm(x[-2:], (features,), None, 1e-6))
    assert (y[:-2] == 1).all()


@pytest.mark.parametrize("shape", [(2**24 + 1, 1), (2**20 + 7, 33), (3, 2**20 + 1)], ids=str)
def test_many_rows_and_long_rows(gpu_backend: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, device="cuda", requires_grad=True)
    weight = torch.rand(shape[1], device="cuda", requires_grad=True)
    grad = torch.randn_like(x)
    y = functional.rms_norm(x, (shape[1],), weight, 1e-6)
    actual = [y, *torch.autograd.grad(y, [x, weight], grad)]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.rms_norm(wide[0], (shape[1],), wide[1], 1e-6)
    exacts = [expected, *torch.autograd.grad(expected, wide, grad.double())]
    for a, e in zip(actual, exacts, strict=True):
        scale = e.abs().max().item()
        assert (a.double() - e).abs().max().item() <= 1e-5 * max(1.0, scale)
