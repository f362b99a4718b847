"""Lion and LAMB as their papers write them, one tensor after another, in the tensors' own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lion(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Chen et al. (2023), Algorithm 2; in place."""
    g = -g if maximize else g
    update = (beta1 * m + (1 - beta1) * g).sign()
    m.copy_(beta2 * m + (1 - beta2) * g)
    if weight_decay:
        update = update + weight_decay * p
    p.sub_(lr * update)


def lamb(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: float,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """You et al. (2020), Algorithm 2; in place."""
    g = -g if maximize else g
    m.copy_(beta1 * m + (1 - beta1) * g)
    v.copy_(beta2 * v + (1 - beta2) * g.square())
    u = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    if weight_decay:
        u = u + weight_decay * p
    norms = (p.double().norm(), u.double().norm())
    ratio = (norms[0] / norms[1]).to(p.dtype) if all(norms) else 1.0
    p.sub_(lr * ratio * u)


class _Oracle(torch.optim.Optimizer):
    def __init__(self, params: Any, *, foreach: bool = False, **options: Any) -> None:
        assert not foreach
        super().__init__(params, {"maximize": False, "weight_decay": 0.0, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            options = {
                "lr": float(group["lr"]),
                "beta1": beta1,
                "beta2": beta2,
                "weight_decay": group["weight_decay"],
                "maximize": group["maximize"],
            }
            for p in group["params"]:
                if p.grad is None:
                    continue
                real = torch.view_as_real if p.is_complex() else lambda t: t
                self.update(p, real, group, options)

    def update(self, p: Tensor, real: Any, group: dict[str, Any], options: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(_Oracle):
    """`lion` as an optimizer."""

    def __init__(
        self, params: Any, lr: Any = 1e-4, betas: Any = (0.9, 0.99), **options: Any
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, **options)

    def update(self, p: Tensor, real: Any, group: dict[str, Any], options: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        lion(real(p), real(p.grad), real(state["exp_avg"]), **options)


class Lamb(_Oracle):
    """`lamb` as an optimizer."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, **options)

    def update(self, p: Tensor, real: Any, group: dict[str, Any], options: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        moments = (real(state["exp_avg"]), real(state["exp_avg_sq"]))
        t = state["step"].item()
        lamb(real(p), real(p.grad), *moments, t, eps=group["eps"], **options)
