"""The deviations alone, against float64: where their terms cancel, and where products of keys leave
float32's range.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effkern.ops.attention_without_scores import KERNELS
from tests.ops.test_norm_attention import padding
from tests.support.backends import Backend
from tests.support.norm_attention import _only_backends_with_a_kernel  # noqa: F401

kinds = pytest.mark.parametrize("kind", ["none", "causal", "padding"])
ROWS = 200


def deviations(q: Tensor, k: Tensor, kind: str) -> Tensor:
    forward, _ = KERNELS(q)
    acc = torch.promote_types(q.dtype, torch.float32)
    seen = padding(1, k.shape[-2], str(q.device))[:, :, 0] if kind == "padding" else None
    tau = torch.ones((), dtype=acc, device=q.device)
    return forward(q, k, seen, tau, 1e-6, q.shape[-1] ** -0.5, kind == "causal")[2]


def by_scores(q: Tensor, k: Tensor, kind: str) -> Tensor:
    """The definition in float64; infinity among fewer than two keys."""
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    seen = torch.ones_like(scores, dtype=torch.bool)
    if kind == "causal":
        seen = seen.tril()
    if kind == "padding":
        seen = seen & padding(1, k.shape[-2], str(q.device))
    count = seen.sum(-1, keepdim=True)
    mean = torch.where(seen, scores, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(seen, scores - mean, 0).square().sum(-1, keepdim=True)
    sigma = (squares / count.clamp(min=1)).sqrt()
    return torch.where(count > 1, sigma, math.inf).squeeze(-1)


def assert_close(q: Tensor, k: Tensor, kind: str, rtol: float) -> None:
    """In causal attention for the rows that see more keys than those of their own chunk, whose
    scores are of float32.
    """
    first = 64 if kind == "causal" else 0
    mine, exact = deviations(q, k, kind).double(), by_scores(q, k, kind)
    torch.testing.assert_close(mine[..., first:], exact[..., first:], rtol=rtol, atol=0)


def orthogonal(features: int, device: str, size: float) -> tuple[Tensor, Tensor]:
    """Keys that are ``size`` times as long in one direction, and queries orthogonal to it, but for
    every third.
    """
    q, k = (torch.randn(1, 2, ROWS, features, device=device) for _ in "qk")
    q[:, :, torch.arange(ROWS) % 3 != 0, 0] = 0
    k[..., 0] *= size
    # The direction is no axis: a query's terms are of the keys' size, and cancel.
    turned = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0].to(device)
    return (q.double() @ turned).float(), (k.double() @ turned).float()


@pytest.mark.parametrize("features", [16, 64, 80])
@kinds
def test_queries_orthogonal_to_the_keys_leading_direction(
    backend: Backend, kind: str, features: int
) -> None:
    """The form of the covariance in float32 alone is off by 5e-3 and more here."""
    assert_close(
        *orthogonal(features, backend.device, 1e3), kind, 2e-4 if kind == "causal" else 1e-4
    )


@kinds
def test_a_row_does_not_depend_on_the_others(backend: Backend, kind: str) -> None:
    """Bit for bit, whether its terms cancel or those of its neighbours do."""
    q, k = orthogonal(64, backend.device, 1e3)
    together = deviations(q, k, kind)
    for hidden in range(3):
        alone = q.clone()
        alone[:, :, torch.arange(ROWS) % 3 == hidden] = 1
        rest = torch.arange(ROWS) % 3 != hidden
        assert torch.equal(deviations(alone, k, kind)[..., rest], together[..., rest])


@pytest.mark.parametrize("size", [1e-22, 1e-16, 1e17])
@kinds
def test_keys_whose_products_leave_the_range_of_float32(
    backend: Backend, kind: str, size: float
) -> None:
    q, k = (torch.randn(1, 2, ROWS, 64, device=backend.device) for _ in "qk")
    assert_close(q / size, k * size, kind, 1e-5)
