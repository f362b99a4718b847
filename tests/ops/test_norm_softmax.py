"""NormSoftmax on every backend: values and gradients against float64, masks, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effkern.backends.reference import norm_softmax as reference
from effkern.nn.functional import norm_softmax
from tests.support.backends import Backend
from tests.support.softmaxes import EPS, check, masks, naive, rows_of_every_branch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
#: Their names: tests/support/softmaxes.py.
KINDS = ["none", "bool", "own", "wide", "other", "keys", "causal", "queries"]


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(backend: Backend, dtype: torch.dtype, kind: str) -> None:
    if backend.slow and dtype != torch.float32 and kind not in ("none", "own"):
        return
    for features in (96, 33):
        x = rows_of_every_branch(features, dtype, backend.device)
        check(x, mask=masks(tuple(x.shape), dtype, backend.device)[kind])


@pytest.mark.parametrize("tau", [0.001, 0.01, 0.3, 1.0, 3.0, float("inf")])
def test_temperatures(backend: Backend, tau: float) -> None:
    """Below eps, at it and above."""
    if backend.slow and tau in (0.3, 3.0):
        return
    check(rows_of_every_branch(40, device=backend.device), tau=tau)


def test_a_number_keeps_its_digits(backend: Backend) -> None:
    """0.3 in float32 is another number, and it is there that PyTorch makes tensors of numbers."""
    x = 9 * torch.randn(4, 6, dtype=torch.float64, device=backend.device)
    expected = torch.softmax(x / 0.3, -1)
    torch.testing.assert_close(norm_softmax(x, tau=0.3), expected, rtol=1e-12, atol=0)


def test_every_branch_is_reached() -> None:
    """By the rows that all tests here are of."""
    for dtype in DTYPES:
        for features in (33, 96):
            variance = rows_of_every_branch(features, dtype).double().var(-1, correction=0)
            is_sigma, is_tau = reference.branches(variance, features, 1.0, EPS)
            assert is_sigma.sum() == 3 and is_tau.sum() == 2 and (~(is_sigma | is_tau)).sum() == 2


def test_the_definition_is_the_naive_formula() -> None:
    x = rows_of_every_branch(50, torch.float64).requires_grad_()
    for dim in (0, 1, -1):
        mine, stock = reference.norm_softmax(x, None, 1.0, EPS, dim % 2), naive(x, dim, 1.0, EPS)
        torch.testing.assert_close(mine, stock)
        grad = torch.randn_like(x)
        torch.testing.assert_close(
            torch.autograd.grad(mine, x, grad), torch.autograd.grad(stock, x, grad)
        )


@pytest.mark.parametrize("features", [1, 2, 3, 5, 8, 17, 64, 129, 1025])
def test_lengths(backend: Backend, features: int) -> None:
    if backend.slow and features > 200:
        return
    x = rows_of_every_branch(features, device=backend.device)
    check(x)
    check(x, mask=torch.rand(features, device=backend.device) > 0.5)


@pytest.mark.parametrize("features", [8192, 8193, 16385, 262144])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_long_rows(backend: Backend, features: int, kind: str) -> None:
    """The longest that are held, and some that are not."""
    if backend.slow and (features > 16385 or features == 8192 or kind == "bool"):
        return
    x = torch.randn(2, features, device=backend.device) * torch.tensor([[0.4], [3.0]]).to(
        backend.device
    )
    mask = None if kind == "none" else torch.rand(features, device=backend.device) > 0.3
    if kind == "additive":
        mask = torch.where(mask, torch.randn(2, features, device=backend.device), float("-inf"))
        mask[1] = float("-inf")
    # The definition's sum over so many may be luckier than that of what users write.
    check(x, mask=mask, plain=naive if kind == "none" else None)
    if features == 16385 and not backend.slow:
        check(x.bfloat16(), mask=mask)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_dimensions(backend: Backend, dim: int) -> None:
    x = torch.randn(3, 21, 5, device=backend.device)
    if backend.slow and dim < 0:
        return
    check(x, dim)
    check(x, dim, mask=torch.rand(21, 5, device=backend.device) > 0.4)
    check(x.transpose(0, 2).bfloat16(), dim, mask=torch.randn(21, 1, device=backend.device))


def test_a_long_dimension_that_is_not_the_last(backend: Backend) -> None:
    features = 600 if backend.slow else 20000
    x = torch.randn(features, 3, device=backend.device)
    check(x, 0, mask=torch.rand(features, 1, device=backend.device) > 0.4)


def layouts(device: str) -> dict[str, Tensor]:
    base = torch.randn(4, 6, 5, 40, device=device)
    return {
        "sliced row": base[..., 3:35],
        "sliced rows": base[:, ::2],
        "permuted rows": base.permute(2, 0, 1, 3),
        "four levels of stride": torch.randn(8, 8, 8, 8, 8, device=device)[::2, ::3, ::2, 1::2],
        "strided elements": base.transpose(-1, -2)[:, :, :9],
        "every other element": base[..., ::2],
        "expanded rows": base[:1].expand(3, 6, 5, 40),
        "expanded elements": base[..., :1].expand(4, 6, 5, 32),
        "unaligned storage": torch.randn(7 * 33 + 1, device=device)[1:].view(7, 33),
        "unaligned rows": torch.randn(7 * 36 + 1, device=device)[1:].view(7, 36),
        "singleton dimensions": base[:1, :, :1],
    }


@pytest.mark.parametrize("layout", list(layouts("cpu")))
def test_layouts(backend: Backend, layout: str) -> None:
    if backend.slow and layout in ("sliced row", "sliced rows", "expanded rows"):
        return
    x, other = (layouts(backend.device)[layout] for _ in range(2))
    check(x, mask=other, grad=layouts(backend.device)[layout])
    check(x, mask=other > 0.3)


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (4, 1), (3, 1, 7), (2, 1, 1, 1), (2, 1, 4, 7), (2, 3, 4, 1)], ids=str
)
def test_masks_are_broadcast(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 4, 7, device=backend.device)
    bias = torch.randn(shape, device=backend.device)
    if backend.slow and shape not in ((1,), (2, 1, 4, 7), (2, 3, 4, 1)):
        return
    for mask in (bias, bias > 0, torch.where(bias > 1, float("-inf"), bias).bfloat16()):
        check(x, mask=mask)
        check(x.transpose(1, 3), 1, mask=mask.expand(2, 3, 4, 7)[..., :1].transpose(1, 3))


def test_a_mask_of_five_dimensions(backend: Backend) -> None:
    x = torch.randn(2, 3, 2, 3, 5, device=backend.device)
    check(x, mask=torch.rand(2, 1, 2, 1, 5, device=backend.device) > 0.4)


def test_hidden_rows(backend: Backend) -> None:
    """Api.md: a hidden row gives zeros and zero gradients; a single entry counts as tau."""
    x = torch.randn(3, 12, device=backend.device, requires_grad=True)
    tau = torch.tensor(0.5, device=backend.device, requires_grad=True)
    mask = torch.zeros(3, 12, dtype=torch.bool, device=backend.device)
    mask[1, 5] = True
    y = norm_softmax(x, tau=tau, mask=mask)
    assert torch.equal(y.detach(), mask.float())
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None and not x.grad.any()
    assert tau.grad is not None and not tau.grad.any()


@pytest.mark.parametrize("low", ["float16", "bfloat16", "float32", "float64", "half", "inf"])
def test_what_an_additive_mask_hides(backend: Backend, low: str) -> None:
    """Half its dtype's lowest number and below; the statistics are those of the others."""
    dtype = torch.float32 if low in ("half", "inf") else getattr(torch, low)
    value = torch.finfo(dtype).min
    value = value / 2 if low == "half" else float("-inf") if low == "inf" else value
    x = rows_of_every_branch(24, device=backend.device)
    visible = torch.rand(24, device=backend.device) > 0.4
    mask = torch.zeros(24, dtype=dtype, device=backend.device).masked_fill(~visible, value)
    expected = norm_softmax(x, mask=visible)
    torch.testing.assert_close(norm_softmax(x, mask=mask), expected)
    kept = torch.where(visible, 0.0, torch.finfo(torch.float32).min / 2.001)
    assert (norm_softmax(x, mask=kept) - expected).abs().max() > 1e-3


@dtypes
def test_nothing_leaks_from_hidden_entries(backend: Backend, dtype: torch.dtype) -> None:
    x = rows_of_every_branch(40, dtype, backend.device)
    grad = torch.randn(x.shape, device=backend.device)
    visible = torch.rand(x.shape, device=backend.device) > 0.5

    def run(rubbish: float) -> list[Tensor]:
        a = torch.where(visible, x, rubbish).to(dtype).requires_grad_()
        y = norm_softmax(a, eps=EPS, mask=visible)
        found = torch.autograd.grad(y, a, torch.where(visible, grad, rubbish).to(dtype))
        return [y.detach(), *found]

    plain = run(0.0)
    for rubbish in (float("nan"), float("inf"), -1e4):
        assert all(map(torch.equal, run(rubbish), plain))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row(backend: Backend, value: float) -> None:
    x = torch.randn(4, 40, device=backend.device)
    x[1, 3] = value
    y = norm_softmax(x)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("magnitude", [1e-18, 1e-4, 1e4, 1e15])
def test_magnitudes(backend: Backend, magnitude: float) -> None:
    x = torch.randn(4, 50, device=backend.device) * magnitude
    check(x, eps=1e-20)
    check(x, tau=magnitude, eps=1e-20)
    check(x.clamp(-6e4, 6e4).half(), tau=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_probabilities_keep_their_digits(backend: Backend, dtype: torch.dtype) -> None:
    """Of two entries the smaller is the exponential of their distance, but for a few roundings."""
    z = torch.linspace(-2.5, -80, 400, dtype=dtype, device=backend.device)
    y = norm_softmax(torch.stack((torch.zeros_like(z), z), 1))
    found, exact = y[:, 1].double() / y[:, 0].double(), z.double().exp()
    if dtype == torch.float32:
        assert ((found - exact).abs() / exact).max() < 4 * torch.finfo(dtype).eps
    else:
        torch.testing.assert_close(found, exact, rtol=8e-16, atol=0.0)


def test_a_common_offset_keeps_the_digits(backend: Backend) -> None:
    x = torch.randn(5, 64, device=backend.device) + 1e4
    check(x)
    check(x, tau=0.1, mask=torch.randn(64, device=backend.device))


@dtypes
def test_constant_rows_are_uniform(backend: Backend, dtype: torch.dtype) -> None:
    """Api.md: the divisor is eps and the gradient g / eps, with no term through sigma."""
    for value in (0.0, 1.0, -3.7, 1e4):
        x = torch.full((3, 24), value, device=backend.device, dtype=dtype, requires_grad=True)
        y = norm_softmax(x, eps=0.125)
        torch.testing.assert_close(y, torch.full_like(y, 1 / 24))
        grad = torch.randn_like(y)
        y.backward(grad)
        expected = (grad.double() - grad.double().mean(-1, keepdim=True)) / 24 / 0.125
        torch.testing.assert_close(x.grad, expected.to(dtype))


def test_gradient_of_a_constant_offset(backend: Backend) -> None:
    """What is the same for all entries has no part in the gradient."""
    x = rows_of_every_branch(30, device=backend.device)
    check(x, grad=torch.randn_like(x) + 1000)
    check(x, grad=torch.ones(1, device=backend.device).expand(x.shape))


@pytest.mark.parametrize("wanted", ["x", "tau", "mask"])
def test_one_gradient_alone(backend: Backend, wanted: str) -> None:
    tensors = {
        "x": rows_of_every_branch(20, device=backend.device),
        "tau": torch.tensor([1.0], device=backend.device),
        "mask": torch.randn(20, device=backend.device),
    }
    tensors[wanted].requires_grad_()
    x, tau, mask = tensors.values()
    found = []
    for function in (
        lambda: norm_softmax(x, tau=tau, mask=mask),
        lambda: reference.norm_softmax(x, mask, tau.reshape(()), 1e-6, 1),
    ):
        tensors[wanted].grad = None
        function().square().sum().backward()
        found.append(tensors[wanted].grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


def test_tau_as_a_tensor(backend: Backend) -> None:
    """Of any dtype and one element, or on the CPU."""
    x = rows_of_every_branch(20, device=backend.device)
    expected = norm_softmax(x, tau=0.5)
    for shape in ((), (1,), (1, 1)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            tau = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
            y = norm_softmax(x, tau=tau)
            assert torch.equal(y.detach(), expected)
            y.square().sum().backward()
            assert tau.grad is not None and tau.grad.shape == shape and tau.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 4), (), (1,)], ids=str)
def test_empty_and_scalar(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=backend.device)
    for dim in range(-max(x.dim(), 1), max(x.dim(), 1)):
        check(x, dim)
        check(x, dim, mask=torch.ones(shape, device=backend.device).bool())


def test_results_are_reproducible(backend: Backend) -> None:
    """Bit for bit, whatever the number of threads."""
    x = torch.randn(100 if backend.slow else 3000, 72, device=backend.device)
    g, tau = torch.randn_like(x), torch.tensor(1.0, device=backend.device, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        a = x.clone().requires_grad_()
        y = norm_softmax(a, tau=tau)
        return y.detach(), *torch.autograd.grad(y, (a, tau), g)

    threads = torch.get_num_threads()
    first = run()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, first, run()))
    finally:
        torch.set_num_threads(threads)


def test_a_row_does_not_depend_on_its_neighbours(backend: Backend) -> None:
    x = torch.randn(37, 100, device=backend.device)
    assert torch.equal(norm_softmax(x)[20:21], norm_softmax(x[20:21]))
    if backend.name == "reference":
        return  # how PyTorch takes a sum depends on where its numbers lie
    y = norm_softmax(x.t().contiguous(), 0)[:, 20:21]
    # With another one: a single column lies in memory as a row.
    assert torch.equal(y, norm_softmax(x[20:22].t().contiguous(), 0)[:, :1])


def test_outputs_are_contiguous_and_new(backend: Backend) -> None:
    x = torch.randn(3, 4, 16, device=backend.device).transpose(0, 1)
    for dim in range(3):
        y = norm_softmax(x, dim)
        assert y.is_contiguous() and y.data_ptr() != x.data_ptr()


def test_large_outputs_written_past_the_caches(backend: Backend) -> None:
    """Beyond 8 MiB the CPU kernels stream their stores, and large pages are asked for."""
    if backend.slow:
        return
    check(torch.randn(1100, 2048, device=backend.device))
