"""A small run of everything that a backend serves, held against torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import effkern
from effkern.nn import functional

#: Wide enough to leave the vectors' multiples behind, small enough for Triton's interpreter.
ROWS, FEATURES = 3, 37
EPS = 1e-6


def check(backend: str, device: str, *, seed: int = 0) -> str:
    """Run RMSNorm and an AdamW step on ``backend`` with random float32 tensors on ``device``.

    Returns:
        What is wrong, in one line; empty where both give torch's results.
    """
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, weight, grad = tensor(ROWS, FEATURES), tensor(FEATURES), tensor(ROWS, FEATURES)
    try:
        with effkern.use_backend(backend):
            wrong = [*_check_rms_norm(x, weight, grad), *_check_adamw(x, grad)]
    except Exception as error:  # whatever a broken installation raises belongs in the report
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ", ".join(wrong)


def _check_rms_norm(x: Tensor, weight: Tensor, grad: Tensor) -> list[str]:
    inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
    ours = functional.rms_norm(inputs[0], weight.shape, inputs[1], EPS)
    ours_grads = torch.autograd.grad(ours, inputs, grad)
    expected = F.rms_norm(inputs[0], weight.shape, inputs[1], EPS)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    wrong = (
        [] if torch.allclose(ours, expected, atol=1e-5) else ["rms_norm forward differs from torch"]
    )
    if not all(
        torch.allclose(*pair, atol=1e-4) for pair in zip(ours_grads, expected_grads, strict=True)
    ):
        wrong.append("rms_norm backward differs from torch")
    return wrong


def _check_adamw(value: Tensor, grad: Tensor) -> list[str]:
    results = []
    for optimizer in (effkern.FusedAdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(value.clone())
        parameter.grad = grad.clone()
        optimizer([parameter], lr=0.1).step()
        results.append(parameter.detach())
    return [] if torch.allclose(results[0], results[1], atol=1e-5) else ["AdamW differs from torch"]
