"""A small run of everything that a backend serves, held against torch."""

from __future__ import annotations

import torch
from torch import Tensor

import effkern
from effkern.bench.norms import NORMS
from effkern.bench.peers import EAGER_NORMS

#: Wide enough to leave the vectors' multiples behind, small enough for Triton's interpreter.
ROWS, FEATURES = 3, 37


def check(backend: str, device: str, *, seed: int = 0) -> str:
    """Run every norm and an AdamW step on ``backend`` with random float32 tensors on ``device``.

    Returns:
        What is wrong, in one line; empty where both give torch's results.
    """
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, grad = tensor(ROWS, FEATURES), tensor(ROWS, FEATURES)
    parameters = tensor(FEATURES), tensor(FEATURES)
    try:
        with effkern.use_backend(backend):
            wrong = [
                finding
                for name in EAGER_NORMS
                for finding in _check_norm(name, x, parameters[: NORMS[name].parameters], grad)
            ]
            wrong += _check_adamw(x, grad)
    except Exception as error:  # whatever a broken installation raises belongs in the report
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ", ".join(wrong)


def _check_norm(name: str, x: Tensor, parameters: tuple[Tensor, ...], grad: Tensor) -> list[str]:
    inputs = [tensor.clone().requires_grad_() for tensor in (x, *parameters)]
    (ours,) = NORMS[name].function(inputs[0], tuple(inputs[1:]), None)
    ours_grads = torch.autograd.grad(ours, inputs, grad)
    expected = EAGER_NORMS[name](*inputs)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    wrong = []
    if not torch.allclose(ours, expected, atol=1e-5):
        wrong.append(f"{name} forward differs from torch")
    if not all(
        torch.allclose(*pair, atol=1e-4) for pair in zip(ours_grads, expected_grads, strict=True)
    ):
        wrong.append(f"{name} backward differs from torch")
    return wrong


def _check_adamw(value: Tensor, grad: Tensor) -> list[str]:
    results = []
    for optimizer in (effkern.FusedAdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(value.clone())
        parameter.grad = grad.clone()
        optimizer([parameter], lr=0.1).step()
        results.append(parameter.detach())
    return [] if torch.allclose(results[0], results[1], atol=1e-5) else ["AdamW differs from torch"]
