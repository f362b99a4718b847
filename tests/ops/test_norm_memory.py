"""``memory_efficient=True``: y is kept in the place of the input; the gradients stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effkern
from effkern.nn import functional
from effkern.ops.norm import affine_norm
from tests.support.backends import Backend
from tests.support.mutants import mutant
from tests.support.norms import CRMS, NORMS, Norm, every_norm


def gradients(
    norm: Norm, memory_efficient: bool, tensors: list[Tensor | None], grads: list[Tensor]
) -> list[Tensor]:
    """Y, and the gradients of x, the residual, the weight and the bias, where there are such."""
    x, residual, weight, bias = (None if t is None else t.clone().requires_grad_() for t in tensors)
    assert x is not None
    out = affine_norm(norm.name, x, x.shape[-1:], weight, bias, 1e-5, residual, memory_efficient)
    outputs = out if isinstance(out, tuple) else (out,)
    inputs = [t for t in (x, residual, weight, bias) if t is not None]
    return [outputs[0].detach(), *torch.autograd.grad(outputs, inputs, grads[: len(outputs)])]


def assert_same(norm: Norm, tensors: list[Tensor | None]) -> None:
    """Both modes, within the roundings of y."""
    x, residual, weight, bias = tensors
    assert x is not None
    grads = [torch.randn_like(x), torch.randn_like(x)]
    ordinary, efficient = (gradients(norm, mode, tensors, grads) for mode in (False, True))
    assert torch.equal(ordinary[0], efficient[0])
    beside = 0.0 if weight is None or bias is None else (bias / weight).abs().max().item()
    # Where rows are short the gradient of x cancels: see `tests.ops.test_norm.check`.
    total = (x if residual is None else x + residual).double()
    terms = norm.rstd(total, 1, 1e-5).max() * grads[0].abs().max()
    if weight is not None:
        terms = terms * weight.abs().max()
    for expected, actual in zip(ordinary[1:], efficient[1:], strict=True):
        scale = max(expected.abs().max().item(), terms.item())
        atol = 8 * torch.finfo(x.dtype).eps * (1 + beside) * scale
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def arguments(
    rows: int, features: int, dtype: torch.dtype, device: str, parameters: str, residual: bool
) -> list[Tensor | None]:
    x, r = (torch.randn(rows, features, device=device).to(dtype) for _ in range(2))
    weight, bias = torch.rand(features, device=device) + 0.5, torch.randn(features, device=device)
    of = torch.float32 if parameters == "wide" else dtype
    return [
        x,
        r if residual else None,
        None if parameters == "none" else weight.to(of),
        None if parameters in ("none", "weight") else (bias / 4).to(of),
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("parameters", ["none", "weight", "both", "wide"])
@every_norm
def test_the_gradients_are_those_of_the_ordinary_mode(
    backend: Backend, norm: Norm, dtype: torch.dtype, parameters: str
) -> None:
    if backend.slow and (norm is CRMS or dtype == torch.float16) and parameters != "both":
        return
    for features in (33, 96):
        for residual in (False, True):
            assert_same(norm, arguments(5, features, dtype, backend.device, parameters, residual))


@pytest.mark.parametrize("features", [1, 1100, 8196, 16385])
@every_norm
def test_rows_of_every_length(backend: Backend, norm: Norm, features: int) -> None:
    if backend.slow and features == 16385:
        return
    rows = 2 if backend.slow else 9
    assert_same(norm, arguments(rows, features, torch.float32, backend.device, "both", True))


@every_norm
def test_large_offsets_and_negative_weights(backend: Backend, norm: Norm) -> None:
    x, residual, weight, _ = arguments(6, 40, torch.float32, backend.device, "both", True)
    assert x is not None and weight is not None
    weight[::2] *= -1
    weight[3], weight[4] = 1e-3, 1e4
    assert_same(norm, [x + 3, residual, weight, None])


UNUSABLE = {
    "zero": lambda w, b: w[2:4].zero_(),
    "tiny": lambda w, b: w[5:6].fill_(1e-37),
    "beside the bias": lambda w, b: (w[1:2].fill_(1e-3), b[1:2].fill_(10)),
    "not a number": lambda w, b: w[7:8].fill_(float("nan")),
}


@pytest.mark.parametrize("how", UNUSABLE)
@every_norm
def test_the_input_is_kept_where_a_weight_leaves_too_little_of_it(
    backend: Backend, norm: Norm, how: str
) -> None:
    """Told from tensors on the CPU at once; on a GPU the gradients become NaN."""
    tensors = arguments(5, 24, torch.float32, backend.device, "both", False)
    UNUSABLE[how](*tensors[2:])
    grads = [torch.randn(5, 24, device=backend.device)]
    ordinary, efficient = (gradients(norm, mode, tensors, grads) for mode in (False, True))
    if backend.device == "cpu":
        torch.testing.assert_close(efficient, ordinary, rtol=0, atol=0, equal_nan=True)
    else:
        assert efficient[1].isnan().all()


@pytest.mark.parametrize("how", UNUSABLE)
@every_norm
def test_the_kernels_make_nan_of_what_cannot_be_restored(
    backend: Backend, norm: Norm, how: str
) -> None:
    """Never a wrong gradient: a caller that could not look at the weight sees it in every row."""
    overload = backend.name if backend.name in ("simt", "triton", "reference") else "default"
    x, _, weight, bias = arguments(5, 40, torch.float32, backend.device, "both", False)
    UNUSABLE[how](weight, bias)
    y, kept = norm.op("forward", overload)(x, weight, bias, 1, 1e-5)
    call = torch.randn_like(x), None, y, weight, kept, 1, True, True, True, True, bias
    grad_x, grad_weight, grad_bias = norm.op("backward", overload)(*call)
    assert grad_x.isnan().all()
    assert grad_weight.isnan().any() and not grad_weight.isnan().all()
    assert grad_bias.isfinite().all()


def unpack(tensor: Tensor) -> Tensor:
    return tensor


@every_norm
def test_y_is_kept_and_not_the_input(norm: Norm) -> None:
    x, residual, weight, bias = arguments(64, 32, torch.float32, "cpu", "both", True)
    for given in (None, residual):
        for memory_efficient in (False, True):
            kept: list[Tensor] = []

            def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
                kept.append(tensor)
                return tensor

            leaf = x.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                out = affine_norm(
                    norm.name, leaf, (32,), weight, bias, 1e-5, given, memory_efficient
                )
            y, total = out if isinstance(out, tuple) else (out, leaf)
            places = {t.data_ptr() for t in kept}
            assert (y.data_ptr() in places) == memory_efficient
            assert (total.data_ptr() in places) != memory_efficient
            known = [y, total, weight, bias]
            others = [t for t in kept if t.data_ptr() not in {k.data_ptr() for k in known}]
            assert sum(t.nbytes for t in others) == norm.numbers * 64 * 4  # the statistics


def test_a_chain_of_layers_keeps_one_tensor_less_for_each_norm() -> None:
    """Where a layer keeps its input, the norm's y, and nothing else keeps the norm's input."""

    def kept(memory_efficient: bool) -> int:
        net = nn.Sequential()
        for _ in range(3):
            net += nn.Sequential(
                effkern.nn.RMSNorm(32, memory_efficient=memory_efficient), nn.Linear(32, 32)
            )
        parameters = {p.data_ptr() for p in net.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            net(torch.randn(64, 32))
        return sum(size for place, size in found.items() if place not in parameters)

    assert kept(False) - kept(True) == 3 * 64 * 32 * 4


@every_norm
def test_second_derivatives_are_refused(norm: Norm) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    y = affine_norm(norm.name, x, (8,), None, None, 1e-5, memory_efficient=True)
    with pytest.raises(RuntimeError, match="memory_efficient=True keeps no input"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_an_output_that_was_overwritten_is_noticed() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    y = functional.rms_norm(x, (8,), memory_efficient=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.mul_(2).sum().backward()


@every_norm
def test_compiled(norm: Norm) -> None:
    torch._dynamo.reset()
    tensors = arguments(6, 16, torch.float32, "cpu", "both", True)

    def loss(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, total = affine_norm(norm.name, x, (16,), weight, bias, 1e-5, residual, True)
        return (y * total.sin()).sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        found.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*found)


@every_norm
def test_opcheck(norm: Norm) -> None:
    x, _, weight, bias = arguments(6, 16, torch.float32, "cpu", "both", False)
    y, kept = norm.op("forward")(x, weight, bias, 1, 1e-5)
    call = x, None, y, weight, kept, 1, True, True, True, True, bias
    for overload in ("default", "reference"):
        torch.library.opcheck(norm.op("backward", overload), call)


@every_norm
def test_func_and_meta_tensors(norm: Norm) -> None:
    """Under torch.func nothing is kept; a tensor without values is not looked at."""
    x, weight = torch.randn(3, 8), torch.zeros(8)
    results = [
        torch.func.grad(
            lambda a, m=mode: affine_norm(
                norm.name, a, (8,), weight, None, 1e-5, memory_efficient=m
            ).sum()
        )(x)
        for mode in (False, True)
    ]
    assert torch.equal(*results)
    with torch._subclasses.FakeTensorMode():
        a = torch.empty(3, 8, requires_grad=True)
        y = affine_norm(norm.name, a, (8,), torch.empty(8), None, 1e-5, memory_efficient=True)
        y.sum().backward()
        assert a.grad is not None and a.grad.shape == (3, 8)


@pytest.mark.parametrize(
    ("module", "features"),
    [
        (effkern.nn.RMSNorm(16, memory_efficient=True), 16),
        (effkern.nn.LayerNorm(16, memory_efficient=True), 16),
        (effkern.nn.CRMSNorm(17, elementwise_affine=True, memory_efficient=True), 16),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules(module: Any, features: int) -> None:
    x = torch.randn(3, features, requires_grad=True)
    for residual in (None, torch.randn(3, features)):
        out = module(x, residual)
        y = out if residual is None else out[0]
        assert any(saved is y or torch.equal(saved, y) for saved in y.grad_fn.saved_tensors)
        assert not any(
            saved is not None and saved.shape == x.shape and not torch.equal(saved, y)
            for saved in y.grad_fn.saved_tensors
        )
    assert not type(module).memory_efficient  # what a swapped module has


def test_the_ordinary_mode_is_the_default() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    for y in (
        functional.rms_norm(x, (8,)),
        functional.layer_norm(x, (8,)),
        functional.crms_norm(x),
        effkern.nn.RMSNorm(8)(x),
        effkern.nn.LayerNorm(8)(x),
        effkern.nn.CRMSNorm(9)(x),
    ):
        assert any(saved is not None and torch.equal(saved, x) for saved in y.grad_fn.saved_tensors)


def ignores_the_bias(f: Any, *call: Any) -> Any:
    return f(*call[:10])


def takes_y_for_x(f: Any, *call: Any) -> Any:
    return f(*call[:9])


def forgets_rstd(f: Any, *call: Any) -> Any:
    grad, grad_total, y, weight, kept, *rest = call
    return f(
        grad, grad_total, y / kept.reshape(-1, *y.shape[:-1])[-1, :, None], weight, kept, *rest
    )


@pytest.mark.parametrize(
    ("norm", "change"),
    [
        (norm, change)
        for norm in NORMS
        for change in (ignores_the_bias, takes_y_for_x, forgets_rstd)
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_broken_restoration_fails(norm: Norm, change: Any) -> None:
    x, residual, weight, bias = arguments(6, 24, torch.float32, "cpu", "both", False)

    def broken(f: Any, *call: Any) -> Any:
        return change(f, *call) if len(call) > 9 and call[9] else f(*call)

    name = f"memory_{norm}_{change.__name__}"
    with mutant(name, **{f"{norm}_backward": broken}), pytest.raises(AssertionError):
        assert_same(norm, [x + 2, residual, weight, bias])
