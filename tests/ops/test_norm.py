"""Every norm on every backend: values and gradients against float64, layouts, determinism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.nn.functional import crms_norm, layer_norm, rms_norm
from tests.support.accuracy import assert_as_accurate
from tests.support.backends import Backend
from tests.support.norms import CRMS, LAYER, RMS, Norm, every_norm

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def check(
    norm: Norm,
    x: Tensor,
    *parameters: Tensor | None,
    residual: Tensor | None = None,
    eps: float | None = 1e-5,
    dims: int = 1,
    grad: Tensor | None = None,
    uses_total: bool = True,
) -> None:
    """Compare values and all gradients with float64, by the rule of agreement.

    The float64 run starts from the sum as rounded to the dtype, whose statistics those are
    (api.md).
    """
    leaves = [x, residual, *[*parameters, None, None][:2]]
    acc = accumulation_dtype(x.dtype)
    # An eps of None means that of the dtype of the run under test, not of the float64 oracle.
    e = torch.finfo(acc).eps if eps is None else eps

    def run(kind: str) -> list[Tensor | None]:
        wide = kind == "exact"
        mine = [
            None if t is None else (t.detach().double() if wide else t.detach()).requires_grad_()
            for t in leaves
        ]
        a, r, *p = mine
        assert a is not None
        if kind == "actual":
            out = norm(a, *p, dims=dims, eps=eps, residual=r)
            y, total = out if isinstance(out, tuple) else (out, a)
        else:
            total = a if r is None else a + r
            if wide and r is not None:
                rounded = (x + residual).double()
                total = total + (rounded - total).detach()
            y = norm.eager(total, dims, p, e)
        g = torch.ones_like(y) if grad is None else grad.to(y.dtype)
        loss = (y * g).sum()
        if r is not None and uses_total:
            loss = loss + (total * g.flip(-1)).sum()
        loss.backward()
        return [y.detach(), total.detach(), *(None if t is None else t.grad for t in mine)]

    actual, stock, exact = run("actual"), run("eager"), run("exact")
    # Where rows are short the gradient of x cancels: allow a few roundings of the terms that
    # cancel.
    scale = 0.0
    if x.numel():
        rstd = norm.rstd(exact[1], dims, e).max().item()
        weight = leaves[2]
        biggest = 1.0 if weight is None else weight.abs().max().item()
        scale = rstd * biggest * (1.0 if grad is None else grad.abs().max().item())
    for what, mine, theirs, wanted in zip(
        ("y", "total", "grad_x", "grad_residual", "grad_weight", "grad_bias"),
        actual,
        stock,
        exact,
        strict=False,
    ):
        if wanted is not None:
            assert mine is not None, f"no {what}"
            atol = 8 * torch.finfo(acc).eps * (scale if what in CANCELS else 1.0)
            assert_as_accurate(mine, theirs, wanted, atol=atol, what=what)


CANCELS = ("grad_x", "grad_residual")


def is_spared(backend: Backend, norm: Norm) -> bool:
    """Whether some cases may do: where kernels are interpreted, RMSNorm alone tries every way
    through the loops that all norms share.
    """
    return backend.slow and norm is not RMS


def parameters_of(
    norm: Norm, kind: str, features: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor | None]:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    other = torch.float16 if dtype != torch.float16 else torch.bfloat16
    if kind == "none":
        return []
    wanted = {"same": (dtype, dtype), "wide": (acc, acc), "other": (other, other)}
    wanted |= {"weight alone": (dtype, None), "bias alone": (None, dtype), "mixed": (other, acc)}
    made = norm.random_parameters((features,), device=device)
    return [None if d is None else p.to(d) for p, d in zip(made, wanted[kind], strict=False)]


@dtypes
@pytest.mark.parametrize("kind", ["none", "same", "wide", "other"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@every_norm
def test_values_and_gradients(
    backend: Backend, norm: Norm, dtype: torch.dtype, kind: str, residual: bool
) -> None:
    if is_spared(backend, norm) and (dtype == torch.float16 or kind in ("none", "wide")):
        return
    for features in (96, 33):
        x = torch.randn(5, features, dtype=torch.float64).to(dtype).to(backend.device)
        r = torch.randn(5, features).to(dtype).to(backend.device) if residual else None
        parameters = parameters_of(norm, kind, features, dtype, backend.device)
        check(norm, x, *parameters, residual=r, grad=torch.randn_like(x))


@dtypes
@pytest.mark.parametrize("kind", ["weight alone", "bias alone", "mixed"])
@every_norm
def test_one_parameter_or_two_dtypes(
    backend: Backend, norm: Norm, dtype: torch.dtype, kind: str
) -> None:
    if is_spared(backend, norm) and (dtype == torch.float16 or kind == "mixed"):
        return
    x = torch.randn(9, 40).to(dtype).to(backend.device)
    parameters = parameters_of(norm, kind, 40, dtype, backend.device)
    check(norm, x, *parameters, residual=torch.randn_like(x), grad=torch.randn_like(x))
    check(norm, x, *parameters, grad=torch.randn_like(x))


@dtypes
@pytest.mark.parametrize("kind", ["none", "same", "wide", "other", "bias alone", "mixed"])
@every_norm
def test_inference_is_the_forward_pass(
    backend: Backend, norm: Norm, dtype: torch.dtype, kind: str
) -> None:
    """To the bit, for one eps or none, whether it goes to the kernel at once or not."""
    if is_spared(backend, norm) and (dtype == torch.float16 or kind == "mixed"):
        return
    parameters = parameters_of(norm, kind, 40, dtype, backend.device)
    for x in (torch.randn(9, 40), torch.randn(3, 5, 80)[:, 1::2, 7:47], torch.randn(0, 40)):
        x = x.to(dtype).to(backend.device)
        for eps in (1e-3, None):
            y = norm(x.requires_grad_(), *parameters, eps=eps)
            with torch.no_grad():
                torch.testing.assert_close(
                    norm(x, *parameters, eps=eps), y.detach(), rtol=0, atol=0
                )
            x = x.detach()


def with_last(x: Tensor) -> Tensor:
    """The d features that d - 1 stand for."""
    return torch.cat([x, -x.sum(-1, keepdim=True)], -1)


def test_crms_norm_is_the_rms_norm_of_its_implied_last_feature(backend: Backend) -> None:
    """Methods.md section 2: of x and -sum(x), also the LayerNorm, whose mean is then zero."""
    x = torch.randn(7, 31, dtype=torch.float64, device=backend.device, requires_grad=True)
    g = torch.randn(7, 31, dtype=torch.float64, device=backend.device)
    y = crms_norm(x, eps=1e-3)
    (grad,) = torch.autograd.grad(y, x, g)
    for norm in (rms_norm, layer_norm):
        full = norm(with_last(x), (32,), eps=1e-3)
        (full_grad,) = torch.autograd.grad(full[..., :-1], x, g)
        torch.testing.assert_close(y, full[..., :-1])
        torch.testing.assert_close(grad, full_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_layer_norm_beside_a_large_common_offset(
    backend: Backend, dtype: torch.dtype, offset: float
) -> None:
    """Up to where float32 leaves four digits to what is normalised."""
    for features in (40, 1500) if backend.slow else (40, 1500, 17000):
        x = (torch.randn(3, features, dtype=torch.float64) + offset).to(dtype).to(backend.device)
        parameters = parameters_of(LAYER, "same", features, dtype, backend.device)
        check(LAYER, x, *parameters, grad=torch.randn_like(x))


@pytest.mark.parametrize("features", [100, 1500, 9000, 17000])
def test_layer_norm_of_rows_that_begin_unlike_the_rest(backend: Backend, features: int) -> None:
    """The sums are taken about the mean of the first features: it must not matter much."""
    if backend.slow and features == 9000:
        return
    x = torch.randn(4, features, device=backend.device)
    x[0, 0] = 1e3
    x[1, :1024] += 300
    x[2, 1024:] += 300
    x[3] = 7.25  # all alike
    check(LAYER, x, grad=torch.randn_like(x))


@pytest.mark.parametrize(
    "features",
    [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 1024],
)
@every_norm
def test_every_remainder(backend: Backend, norm: Norm, features: int) -> None:
    if is_spared(backend, norm) and features not in (1, 7, 8, 33, 257, 1000):
        return
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, features).to(dtype).to(backend.device)
        parameters = parameters_of(norm, "same", features, dtype, backend.device)
        check(norm, x, *parameters, grad=torch.randn_like(x))


# One read up to 16,384 features forward and 8,192 backward, two beyond; then far beyond.
@pytest.mark.parametrize("features", [8191, 8192, 8193, 16384, 16385, 65537])
@every_norm
def test_long_rows(backend: Backend, norm: Norm, features: int) -> None:
    if is_spared(backend, norm) and features not in (8193, 65537):
        return
    x = torch.randn(2, features, device=backend.device)
    r = torch.randn(2, features, device=backend.device)
    parameters = norm.random_parameters((features,), device=backend.device)
    check(norm, x, *parameters, residual=r, grad=torch.randn_like(x))
    if is_spared(backend, norm):
        return
    narrow = [p.bfloat16() for p in parameters]
    check(norm, x[:1].bfloat16(), *narrow, grad=torch.randn_like(x[:1]))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 63, 64, 65, 129, 600])
@every_norm
def test_numbers_of_rows(backend: Backend, norm: Norm, rows: int) -> None:
    if is_spared(backend, norm) and rows not in (1, 9, 129):
        return
    x = torch.randn(rows, 24, device=backend.device)
    parameters = norm.random_parameters((24,), device=backend.device)
    check(norm, x, *parameters, residual=torch.randn_like(x), grad=torch.randn_like(x))


@pytest.mark.parametrize("norm", [RMS, LAYER], ids=str)
def test_several_normalised_dimensions(backend: Backend, norm: Norm) -> None:
    x = torch.randn(3, 2, 4, 5, device=backend.device)
    for dims in (2, 4):
        parameters = norm.random_parameters(x.shape[-dims:], device=backend.device)
        check(norm, x, *parameters, dims=dims, grad=torch.randn_like(x))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 8)])
@every_norm
def test_empty(backend: Backend, norm: Norm, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=backend.device, requires_grad=True)
    parameters = norm.random_parameters(shape[-1:], device=backend.device)
    for parameter in parameters:
        parameter.requires_grad_()
    y, total = norm(x, *parameters, residual=torch.zeros_like(x))
    assert y.shape == total.shape == x.shape
    (y.sum() + total.sum()).backward()
    assert x.grad is not None and x.grad.shape == x.shape
    for parameter in parameters:
        assert parameter.grad is not None and not parameter.grad.any()
        assert parameter.grad.shape == parameter.shape


@every_norm
def test_a_single_row_without_leading_dimension(backend: Backend, norm: Norm) -> None:
    x = torch.randn(40, device=backend.device)
    parameters = norm.random_parameters((40,), device=backend.device)
    check(norm, x, *parameters, grad=torch.randn_like(x))


def layouts(device: str) -> dict[str, Tensor]:
    base = torch.randn(4, 6, 5, 40, device=device)
    return {
        "sliced features": base[..., 3:35],
        "sliced rows": base[:, ::2],
        "permuted rows": base.permute(2, 0, 1, 3),
        "four levels of stride": torch.randn(8, 8, 8, 8, 24, device=device)[::2, ::3, ::2, 1::2],
        "features not adjacent": base.transpose(-1, -2)[:2, :2, :9],
        "every other feature": base[..., ::2],
        "expanded rows": base[:1].expand(3, 6, 5, 40),
        "expanded features": base[..., :1].expand(4, 6, 5, 32),
        "rows of stride one": torch.randn(40, 6, device=device).t(),
        "unaligned storage": torch.randn(7 * 33 + 1, device=device)[1:].view(7, 33),
        "singleton dimensions": base[:1, :, :1],
    }


@pytest.mark.parametrize("layout", list(layouts("cpu")))
@every_norm
def test_layouts(backend: Backend, norm: Norm, layout: str) -> None:
    if is_spared(backend, norm) and layout not in ("permuted rows", "unaligned storage"):
        return
    x = layouts(backend.device)[layout]
    features = x.shape[-1]
    parameters = [p[::2] for p in norm.random_parameters((2 * features,), device=backend.device)]
    residual = layouts(backend.device)[layout]
    grad = torch.randn(x.shape, device=backend.device)
    check(norm, x, *parameters, residual=residual, grad=grad)
    check(norm, x, *parameters, grad=layouts(backend.device)[layout])


@every_norm
def test_expanded_gradient(backend: Backend, norm: Norm) -> None:
    """`y.sum().backward()` hands down a gradient of stride zero."""
    x = torch.randn(6, 48, device=backend.device)
    parameters = norm.random_parameters((48,), device=backend.device)
    check(norm, x, *parameters, grad=torch.ones(1, device=backend.device).expand(6, 48))


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias"])
@every_norm
def test_one_gradient_alone(backend: Backend, norm: Norm, wanted: str) -> None:
    made = norm.random_parameters((33,), device=backend.device)
    tensors = {
        "x": torch.randn(5, 33, device=backend.device),
        "residual": torch.randn(5, 33, device=backend.device),
    } | dict(zip(("weight", "bias"), made, strict=False))
    if wanted not in tensors:
        return
    tensors[wanted].requires_grad_()
    x, residual, *parameters = tensors.values()
    found = []
    for stock in (False, True):
        tensors[wanted].grad = None
        if stock:
            total = x + residual
            y = norm.eager(total, 1, parameters, 1e-5)
        else:
            y, total = norm(x, *parameters, residual=residual)
        (y.square().sum() + (total.sum() if wanted in ("x", "residual") else 0)).backward()
        found.append(tensors[wanted].grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


@every_norm
def test_only_the_sum_is_used(backend: Backend, norm: Norm) -> None:
    x = torch.randn(5, 8, device=backend.device, requires_grad=True)
    r = torch.randn(5, 8, device=backend.device, requires_grad=True)
    w = torch.rand(8, device=backend.device, requires_grad=True)
    _, total = norm(x, w, residual=r)
    (3 * total).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3)) and torch.equal(r.grad, torch.full_like(r, 3))
    assert w.grad is None or not w.grad.any()


@every_norm
def test_nothing_flows_back_through_a_sum_of_frozen_inputs(backend: Backend, norm: Norm) -> None:
    x, r = torch.randn(2, 5, 8, device=backend.device)
    w = torch.rand(8, device=backend.device, requires_grad=True)
    y, total = norm(x, w, residual=r)
    assert y.requires_grad and not total.requires_grad
    assert torch.equal(total, x + r)


@dtypes
@every_norm
def test_the_fused_residual_equals_the_unfused(
    backend: Backend, norm: Norm, dtype: torch.dtype
) -> None:
    """The statistics are those of the sum as returned: api.md, "norm with residual"."""
    x, r = (torch.randn(9, 70).to(dtype).to(backend.device) for _ in range(2))
    parameters = parameters_of(norm, "same", 70, dtype, backend.device)
    y, total = norm(x, *parameters, residual=r)
    assert torch.equal(total, x + r)
    assert torch.equal(y, norm(x + r, *parameters))


@dtypes
@pytest.mark.parametrize("norm", [RMS, CRMS], ids=str)
def test_eps_none_is_that_of_the_accumulation_dtype(
    backend: Backend, norm: Norm, dtype: torch.dtype
) -> None:
    """Api.md, "eps=None in the norms": tiny rows tell one eps from another."""
    x = (torch.randn(4, 32, dtype=torch.float64) * 3e-4).to(dtype).to(backend.device)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert torch.equal(norm(x, eps=None), norm(x, eps=eps))
    check(norm, x, eps=None, grad=torch.randn(4, 32, device=backend.device))


@every_norm
def test_rows_of_zeros(backend: Backend, norm: Norm) -> None:
    x = torch.zeros(3, 20, device=backend.device)
    parameters = norm.random_parameters((20,), device=backend.device)
    check(norm, x, *parameters, eps=1e-6, grad=torch.randn_like(x))


@every_norm
def test_nan_and_infinity_stay_in_their_row(backend: Backend, norm: Norm) -> None:
    x = torch.randn(4, 40, device=backend.device)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    mine, stock = norm(x), norm.eager(x, 1, [None] * norm.parameters, 1e-5)
    torch.testing.assert_close(mine, stock, equal_nan=True)
    assert mine[0].isfinite().all() and mine[3].isfinite().all()


@pytest.mark.parametrize("magnitude", [1e-18, 1e-4, 1e4, 1e18])
@every_norm
def test_magnitudes(backend: Backend, norm: Norm, magnitude: float) -> None:
    x = torch.randn(4, 50, device=backend.device) * magnitude
    parameters = norm.random_parameters((50,), device=backend.device)
    check(norm, x, *parameters, eps=1e-12, grad=torch.randn_like(x))


@every_norm
def test_the_parameters_gradients_are_reproducible(backend: Backend, norm: Norm) -> None:
    """Bit for bit, whatever the number of threads."""
    x = torch.randn(300 if backend.slow else 3000, 72, device=backend.device)
    g = torch.randn_like(x)
    parameters = [p.requires_grad_() for p in norm.random_parameters((72,), device=backend.device)]

    def gradients() -> tuple[Tensor, ...]:
        a = x.clone().requires_grad_()
        return torch.autograd.grad(norm(a, *parameters), (a, *parameters), g)

    threads = torch.get_num_threads()
    first = gradients()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, first, gradients()))
    finally:
        torch.set_num_threads(threads)


@every_norm
def test_a_row_does_not_depend_on_its_neighbours(backend: Backend, norm: Norm) -> None:
    x = torch.randn(37, 100, device=backend.device)
    assert torch.equal(norm(x)[20:21], norm(x[20:21]))


@every_norm
def test_outputs_are_contiguous_and_new(backend: Backend, norm: Norm) -> None:
    x = torch.randn(3, 4, 16, device=backend.device).transpose(0, 1)
    y, total = norm(x, residual=torch.zeros_like(x))
    assert y.is_contiguous() and total.is_contiguous()
    assert total.data_ptr() != x.data_ptr()


@every_norm
def test_large_outputs_written_past_the_caches(backend: Backend, norm: Norm) -> None:
    """Beyond 8 MiB the CPU kernels stream their stores, and large pages are asked for."""
    if backend.slow or (backend.name == "reference" and norm is not RMS):
        return
    x = torch.randn(1100, 2048, device=backend.device)
    r = torch.randn(1100, 2048, device=backend.device)
    parameters = norm.random_parameters((2048,), device=backend.device)
    check(norm, x, *parameters, residual=r, grad=torch.randn_like(x))
