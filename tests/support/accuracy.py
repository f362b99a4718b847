"""The rule of agreement: at most twice the error that eager PyTorch makes in the same dtype,
against float64."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, *, atol: float = 0.0, what: str = "result"
) -> None:
    """Fail unless ``max|actual - exact| <= 2 max|eager - exact| + atol + two roundings``.

    Args:
        actual: what is tested.
        eager: the same by eager PyTorch in the same dtype.
        exact: the same in float64.
        atol: absolute slack for results that cancel to nearly zero.
        what: named in the failure.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager gives {eager.dtype}"
    if exact.numel() == 0:
        return
    actual64, eager64, exact = (t.detach().cpu().double() for t in (actual, eager, exact))
    finite = exact.isfinite()
    assert torch.equal(actual64.isnan(), exact.isnan()), f"{what}: NaN in other places"
    if not finite.any():
        return
    error = (actual64 - exact)[finite].abs().max().item()
    allowed = 2 * (eager64 - exact)[finite].abs().max().item()
    # Where eager happens to be exact, the last digit is still free.
    allowed += atol + torch.finfo(actual.dtype).eps * exact[finite].abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
