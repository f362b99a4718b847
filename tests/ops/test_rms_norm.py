"""RMSNorm on every backend: values and gradients against float64, layouts, sizes, determinism."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.nn.functional import rms_norm
from tests.support.accuracy import assert_as_accurate
from tests.support.backends import Backend

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def eager(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float | None, dims: int
) -> tuple[Tensor, Tensor]:
    """What a user of stock PyTorch writes: y and the sum."""
    total = x if residual is None else x + residual
    shape = total.shape[-dims:]
    return F.rms_norm(total, shape, weight, eps), total


def check(
    x: Tensor,
    weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float | None = 1e-5,
    dims: int = 1,
    grad: Tensor | None = None,
    uses_total: bool = True,
) -> None:
    """Compare values and all gradients with float64, by the rule of agreement.

    The float64 run starts from the sum as rounded to the dtype, whose statistics those are
    (api.md).
    """
    leaves = [x, weight, residual]

    def run(kind: str) -> list[Tensor | None]:
        wide = kind == "exact"
        mine = [
            None if t is None else (t.detach().double() if wide else t.detach()).requires_grad_()
            for t in leaves
        ]
        a, w, r = mine
        assert a is not None
        # An eps of None means that of the dtype of the run under test, not of the float64 oracle.
        e = torch.finfo(torch.float32 if x.dtype != torch.float64 else x.dtype).eps
        e = e if eps is None else eps
        if kind == "actual":
            out = rms_norm(a, a.shape[a.dim() - dims :], w, eps, residual=r)
            y, total = out if isinstance(out, tuple) else (out, a)
        else:
            y, total = eager(a, r, w, e, dims)
            if wide and r is not None:
                rounded = (x + residual).double()
                total = total + (rounded - total).detach()
                y = F.rms_norm(total, total.shape[-dims:], w, e)
        g = torch.ones_like(y) if grad is None else grad.to(y.dtype)
        loss = (y * g).sum()
        if r is not None and uses_total:
            loss = loss + (total * g.flip(-1)).sum()
        loss.backward()
        return [y.detach(), total.detach(), *(None if t is None else t.grad for t in mine)]

    actual, stock, exact = run("actual"), run("eager"), run("exact")
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Where rows are short the gradient of x cancels: allow a few roundings of the terms that
    # cancel.
    scale = 0.0
    if x.numel():
        mean_square = exact[1].square().mean(list(range(-dims, 0)))
        rstd = (mean_square + (eps or torch.finfo(acc).eps)).rsqrt().max().item()
        biggest = 1.0 if weight is None else weight.abs().max().item()
        scale = rstd * biggest * (1.0 if grad is None else grad.abs().max().item())
    for what, a, s, e in zip(
        ("y", "total", "grad_x", "grad_weight", "grad_residual"), actual, stock, exact, strict=True
    ):
        if e is not None:
            assert a is not None, f"no {what}"
            atol = 8 * torch.finfo(acc).eps * (scale if what.startswith("grad_x") else 1.0)
            if what == "grad_residual":
                atol = 8 * torch.finfo(acc).eps * scale
            assert_as_accurate(a, s, e, atol=atol, what=what)


def weights(features: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    other = torch.float16 if dtype != torch.float16 else torch.bfloat16
    return {
        "none": None,
        "same": (torch.rand(features) + 0.5).to(dtype),
        "wide": (torch.rand(features) + 0.5).to(acc),
        "other": (torch.rand(features) + 0.5).to(other),
    }


@dtypes
@pytest.mark.parametrize("weight", ["none", "same", "wide", "other"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_values_and_gradients(
    backend: Backend, dtype: torch.dtype, weight: str, residual: bool
) -> None:
    for features in (96, 33):
        x = torch.randn(5, features, dtype=torch.float64).to(dtype).to(backend.device)
        r = torch.randn(5, features).to(dtype).to(backend.device) if residual else None
        w = weights(features, dtype)[weight]
        check(x, None if w is None else w.to(backend.device), r, grad=torch.randn_like(x))


@pytest.mark.parametrize(
    "features",
    [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 1024],
)
def test_every_remainder(backend: Backend, features: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, features).to(dtype).to(backend.device)
        w = torch.rand(features).to(dtype).to(backend.device)
        check(x, w, grad=torch.randn_like(x))


# One read up to 16,384 features forward and 8,192 backward, two beyond; then far beyond.
@pytest.mark.parametrize("features", [8191, 8192, 8193, 16384, 16385, 65537])
def test_long_rows(backend: Backend, features: int) -> None:
    x = torch.randn(2, features, device=backend.device)
    r = torch.randn(2, features, device=backend.device)
    w = torch.rand(features, device=backend.device)
    check(x, w, r, grad=torch.randn_like(x))
    check(x[:1].bfloat16(), w.bfloat16(), grad=torch.randn_like(x[:1]))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 63, 64, 65, 129, 600])
def test_numbers_of_rows(backend: Backend, rows: int) -> None:
    x = torch.randn(rows, 24, device=backend.device)
    check(x, torch.rand(24, device=backend.device), torch.randn_like(x), grad=torch.randn_like(x))


def test_several_normalised_dimensions(backend: Backend) -> None:
    x = torch.randn(3, 2, 4, 5, device=backend.device)
    check(x, torch.rand(4, 5, device=backend.device), dims=2, grad=torch.randn_like(x))
    check(x, torch.rand(3, 2, 4, 5, device=backend.device), dims=4, grad=torch.randn_like(x))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 8)])
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=backend.device, requires_grad=True)
    w = torch.ones(shape[-1], device=backend.device, requires_grad=True)
    y, total = rms_norm(x, (shape[-1],), w, residual=torch.zeros_like(x))
    assert y.shape == total.shape == x.shape
    (y.sum() + total.sum()).backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert w.grad is not None and torch.equal(w.grad, torch.zeros_like(w))


def test_a_single_row_without_leading_dimension(backend: Backend) -> None:
    x = torch.randn(40, device=backend.device)
    check(x, torch.rand(40, device=backend.device), grad=torch.randn_like(x))


def layouts(device: str) -> dict[str, Tensor]:
    base = torch.randn(4, 6, 5, 40, device=device)
    return {
        "sliced features": base[..., 3:35],
        "sliced rows": base[:, ::2],
        "permuted rows": base.permute(2, 0, 1, 3),
        "four levels of stride": torch.randn(8, 8, 8, 8, 24, device=device)[::2, ::3, ::2, 1::2],
        "features not adjacent": base.transpose(-1, -2),
        "every other feature": base[..., ::2],
        "expanded rows": base[:1].expand(3, 6, 5, 40),
        "expanded features": base[..., :1].expand(4, 6, 5, 32),
        "rows of stride one": torch.randn(40, 6, device=device).t(),
        "unaligned storage": torch.randn(7 * 33 + 1, device=device)[1:].view(7, 33),
        "singleton dimensions": base[:1, :, :1],
    }


@pytest.mark.parametrize("layout", list(layouts("cpu")))
def test_layouts(backend: Backend, layout: str) -> None:
    x = layouts(backend.device)[layout]
    features = x.shape[-1]
    w = torch.rand(2 * features, device=backend.device)[::2]
    residual = layouts(backend.device)[layout]
    check(x, w, residual, grad=torch.randn(x.shape, device=backend.device))
    check(x, w, grad=layouts(backend.device)[layout])


def test_expanded_gradient(backend: Backend) -> None:
    """`y.sum().backward()` hands down a gradient of stride zero."""
    x = torch.randn(6, 48, device=backend.device)
    check(
        x,
        torch.rand(48, device=backend.device),
        grad=torch.ones(1, device=backend.device).expand(6, 48),
    )


@pytest.mark.parametrize("wanted", ["x", "residual", "weight"])
def test_one_gradient_alone(backend: Backend, wanted: str) -> None:
    tensors = {
        "x": torch.randn(5, 33, device=backend.device),
        "residual": torch.randn(5, 33, device=backend.device),
        "weight": torch.rand(33, device=backend.device),
    }
    tensors[wanted].requires_grad_()
    y, total = rms_norm(tensors["x"], (33,), tensors["weight"], 1e-5, residual=tensors["residual"])
    (y.square().sum() + (total.sum() if wanted != "weight" else 0)).backward()
    mine = tensors[wanted].grad
    tensors[wanted].grad = None
    y, total = eager(tensors["x"], tensors["residual"], tensors["weight"], 1e-5, 1)
    (y.square().sum() + (total.sum() if wanted != "weight" else 0)).backward()
    torch.testing.assert_close(mine, tensors[wanted].grad, rtol=1e-4, atol=1e-4)
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


def test_only_the_sum_is_used(backend: Backend) -> None:
    x = torch.randn(5, 8, device=backend.device, requires_grad=True)
    r = torch.randn(5, 8, device=backend.device, requires_grad=True)
    w = torch.rand(8, device=backend.device, requires_grad=True)
    _, total = rms_norm(x, (8,), w, residual=r)
    (3 * total).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3)) and torch.equal(r.grad, torch.full_like(r, 3))
    assert w.grad is None or not w.grad.any()


@dtypes
def test_the_fused_residual_equals_the_unfused(backend: Backend, dtype: torch.dtype) -> None:
    """The statistics are those of the sum as returned: api.md, "norm with residual"."""
    x, r = (torch.randn(9, 70).to(dtype).to(backend.device) for _ in range(2))
    w = torch.rand(70).to(dtype).to(backend.device)
    y, total = rms_norm(x, (70,), w, residual=r)
    assert torch.equal(total, x + r)
    assert torch.equal(y, rms_norm(x + r, (70,), w))


@dtypes
def test_eps_none_is_that_of_the_accumulation_dtype(backend: Backend, dtype: torch.dtype) -> None:
    """Api.md, "eps=None in the norms": tiny rows tell one eps from another."""
    x = (torch.randn(4, 32, dtype=torch.float64) * 3e-4).to(dtype).to(backend.device)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert torch.equal(rms_norm(x, (32,)), rms_norm(x, (32,), eps=eps))
    check(x, eps=None, grad=torch.randn(4, 32, device=backend.device))


def test_rows_of_zeros(backend: Backend) -> None:
    x = torch.zeros(3, 20, device=backend.device)
    check(x, torch.rand(20, device=backend.device), eps=1e-6, grad=torch.randn_like(x))


def test_nan_and_infinity_stay_in_their_row(backend: Backend) -> None:
    x = torch.randn(4, 40, device=backend.device)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    mine, stock = rms_norm(x, (40,)), F.rms_norm(x, (40,))
    torch.testing.assert_close(mine, stock, equal_nan=True)
    assert mine[0].isfinite().all() and mine[3].isfinite().all()


@pytest.mark.parametrize("magnitude", [1e-18, 1e-4, 1e4, 1e18])
def test_magnitudes(backend: Backend, magnitude: float) -> None:
    x = torch.randn(4, 50, device=backend.device) * magnitude
    check(x, torch.rand(50, device=backend.device), eps=1e-12, grad=torch.randn_like(x))


def test_the_weight_gradient_is_reproducible(backend: Backend) -> None:
    """Bit for bit, whatever the number of threads."""
    x = torch.randn(300 if backend.slow else 3000, 72, device=backend.device)
    g = torch.randn_like(x)

    def gradients() -> tuple[Tensor, Tensor]:
        a, w = x.clone().requires_grad_(), torch.ones(72, device=x.device, requires_grad=True)
        rms_norm(a, (72,), w).backward(g)
        return a.grad, w.grad

    threads = torch.get_num_threads()
    first = gradients()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = gradients()
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    finally:
        torch.set_num_threads(threads)


def test_a_row_does_not_depend_on_its_neighbours(backend: Backend) -> None:
    x = torch.randn(37, 100, device=backend.device)
    y = rms_norm(x, (100,))
    assert torch.equal(y[20:21], rms_norm(x[20:21], (100,)))


def test_outputs_are_contiguous_and_new(backend: Backend) -> None:
    x = torch.randn(3, 4, 16, device=backend.device).transpose(0, 1)
    y, total = rms_norm(x, (16,), residual=torch.zeros_like(x))
    assert y.is_contiguous() and total.is_contiguous()
    assert total.data_ptr() != x.data_ptr()


def test_large_outputs_written_past_the_caches(backend: Backend) -> None:
    """Beyond 8 MiB the CPU kernels stream their stores, and large pages are asked for."""
    if backend.slow:
        return
    x = torch.randn(1100, 2048, device=backend.device)
    r = torch.randn(1100, 2048, device=backend.device)
    check(x, torch.rand(2048, device=backend.device), r, grad=torch.randn_like(x))
