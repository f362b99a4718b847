"""Every instance of every CUDA kernel runs, also from addresses that allow no 16-byte access, and
agrees with the reference in the same dtype.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype
from tests.simt import build, stored, test_norm_softmax
from tests.simt.variants import CHUNK, DTYPES, VARIANTS, Variant, at_offset
from tests.support.norms import CRMS, NORMS, Norm, every_norm
from tests.support.rules import Tensors, random_tensors

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler")


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=8 * eps, atol=32 * eps)


(LAMB,) = (variant for variant in VARIANTS if variant.rule.name == "lamb")

#: Tails of vectors, nothing, one full chunk, two chunks.
SIZES = [1, 7, 8, 9, 0, CHUNK, CHUNK + 5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_steps_take_any_address(variant: Variant, dtype: torch.dtype) -> None:
    build.load()
    for unaligned in [None, *range(2 + variant.states)]:  # which list starts off 16 bytes
        made = random_tensors(variant.rule, SIZES, dtype, steps=(0, 1, 2))
        *lists, steps = made.lists()
        places = [0, 1, *(2 + s for s, kept in enumerate(variant.kept) if kept)]
        for i, place in enumerate(places):
            lists[place] = [at_offset(tensor, int(i == unaligned)) for tensor in lists[place]]
        mine = Tensors.of([*lists, steps])
        expected = mine.clone()
        variant.by_lists(mine)
        variant.by_lists(expected, "reference")
        for actual, wanted in zip(mine.lists(), expected.lists(), strict=True):
            for a, e in zip(actual, wanted, strict=True):
                close(a, e, dtype)


def comparable(norm: Norm, kept: Tensor, features: int) -> Tensor:
    """What is kept of rows, as numbers around one."""
    return torch.stack((kept[0] / features**0.5, kept[1])) if norm is CRMS else kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["held", "long"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@every_norm
def test_norms_take_any_address(norm: Norm, dtype: torch.dtype, kind: str, offset: int) -> None:
    build.load()
    # 300 features: groups of several warps; 24: several rows to a warp.
    for rows, features in [(9, 24), (5, 296), (40, 304)] if kind == "held" else [(5, 16400)]:
        x, residual, grad, grad_total = (
            at_offset(torch.randn(rows, features).to(dtype), offset) for _ in range(4)
        )
        for of_parameters in {dtype, accumulation_dtype(dtype)}:
            made = norm.random_parameters((features,))
            parameters = [at_offset(p.to(of_parameters), offset) for p in made]
            none, all_, weight = [None] * len(made), [True] * len(made), parameters[0]
            outputs = []
            for overload in ("simt", "reference"):
                forward, add_forward, backward = (
                    norm.op(kind, overload) for kind in ("forward", "add_forward", "backward")
                )
                y, total, kept = add_forward(x, residual, *parameters, 1, 1e-5)
                plain = forward(x, *none, 1, 1e-5)
                both = backward(grad, grad_total, total, weight, kept, 1, True, *all_)
                grad_x = backward(grad, None, total, None, kept, 1, True, *[False] * len(made))
                alone = backward(grad, None, total, weight, kept, 1, False, *all_)
                numbers = [comparable(norm, k, features) for k in (kept, plain[1])]
                outputs.append([y, total, *numbers, plain[0], *both, *grad_x, *alone])
            for actual, expected in zip(*outputs, strict=True):
                close(actual, expected, dtype)


@pytest.mark.parametrize("features", [24, 296, 8200])
@every_norm
def test_rows_may_be_strided_differently(norm: Norm, features: int) -> None:
    build.load()
    shape = (3, 4, features)
    dense = torch.randn(shape)
    strided = torch.randn(3, 4, features + 4)[..., :features]
    permuted = torch.randn(4, 3, features).transpose(0, 1)
    row = torch.randn(features).expand(shape)
    parameters = norm.random_parameters((features,))
    for x, residual, grad, grad_total in (
        (strided, permuted, row, dense),
        (permuted, row, dense, strided),
        (row, dense, strided, permuted),
        (dense, strided, permuted, row),
    ):
        outputs = []
        for overload in ("simt", "reference"):
            y, total, kept = norm.op("add_forward", overload)(x, residual, *parameters, 1, 1e-5)
            _, of_x = norm.op("forward", "reference")(x, *parameters, 1, 1e-5)
            wants = [True] * len(parameters)
            gradients = norm.op("backward", overload)(
                grad, grad_total, x, parameters[0], of_x, 1, True, *wants
            )
            outputs.append([y, total, comparable(norm, kept, features), *gradients])
        for actual, expected in zip(*outputs, strict=True):
            close(actual, expected, torch.float32)


def test_every_instance_runs() -> None:
    """Of each dtype: one kernel for each variant of a rule and a second one for LAMB, one of sums
    of squares, one of the sum of shares, and for each norm four of the forward's two (aligned or
    not) and six of the backward's three. For tensors stored otherwise, two for each launch of a
    variant, with states in 8 bits and without, but one where there are no states. NormSoftmax's:
    tests/simt/test_norm_softmax.py.
    """
    simt = build.load()
    for dtype, variant in product(DTYPES, VARIANTS):
        variant.by_lists(random_tensors(variant.rule, [1], dtype))
        torch.ops.effkern._squares_.simt(
            torch.zeros(1, dtype=torch.float64), 0, [torch.ones(1, dtype=dtype)]
        )
    for variant, way in stored.CASES:
        way.make(variant, [1]).step(stored.overload(variant))
    for norm, dtype, features in product(NORMS, DTYPES, (8, 9, 16400, 16401)):
        x = torch.randn(1, features).to(dtype)
        parameters = norm.random_parameters((features,), dtype=dtype)
        wants = [True] * len(parameters)
        _, kept = norm.op("forward", "simt")(x, *parameters, 1, 1e-5)
        norm.op("backward", "simt")(x, None, x, parameters[0], kept, 1, True, *wants)
    for dtype in DTYPES:
        for run in test_norm_softmax.instances(dtype):
            run()
    of_norms = len(NORMS) * (4 + 6) + 1 + test_norm_softmax.INSTANCES
    assert simt.kernels() == 4 * (len(VARIANTS) + 2 + of_norms) + 2 * (len(VARIANTS) + 1) - 1


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_lamb_takes_parameters_whose_squares_float32_does_not_hold(scale: float) -> None:
    build.load()
    tensors = random_tensors(LAMB.rule, [CHUNK + 9])
    tensors.params[0].mul_(scale)
    exact = tensors.clone(torch.float64)
    LAMB.by_lists(tensors, weight_decay=0.0)
    LAMB.by_lists(exact, "reference", weight_decay=0.0)
    expected = exact.params[0].float()
    torch.testing.assert_close(tensors.params[0], expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_threads_and_blocks_does_not_change_lamb(dtype: torch.dtype) -> None:
    simt = build.load()
    made = random_tensors(LAMB.rule, [5 * CHUNK + 3, 700], dtype)
    results = []
    for seed in range(3):
        simt.seed(seed)
        tensors = made.clone()
        LAMB.by_lists(tensors)
        results.append(tensors.lists())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["groups of lanes", "groups of warps", "long rows"])
@every_norm
def test_the_order_of_threads_and_blocks_changes_nothing(norm: Norm, kind: str) -> None:
    simt = build.load()
    rows, features = {
        "groups of lanes": (70, 24),
        "groups of warps": (40, 700),
        "long rows": (20, 8200),
    }[kind]
    x, grad = torch.randn(rows, features), torch.randn(rows, features)
    parameters = norm.random_parameters((features,))
    wants = [True] * len(parameters)
    results = []
    for seed in range(3):
        simt.seed(seed)
        y, kept = norm.op("forward", "simt")(x, *parameters, 1, 1e-5)
        gradients = norm.op("backward", "simt")(grad, None, x, parameters[0], kept, 1, True, *wants)
        results.append([y, kept, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
