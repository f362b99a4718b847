"""LAMB."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops import step as _ops
from effkern.optim.arguments import check_lr, check_not_negative, checked_betas
from effkern.optim.fused import FusedOptimizer
from effkern.optim.sharded_lamb import ShardedLamb

__all__ = ["FusedLAMB"]


class FusedLAMB(FusedOptimizer):
    """LAMB (You et al., 2020, Algorithm 2): Adam's direction at a length set layer by layer.

        r      = m / (sqrt(v) + eps) + weight_decay * param       m, v: bias-corrected means
        param <- param - lr * (|param| / |r|) * r

    The ratio of norms is 1 where either is 0; it is applied also without decay. Each parameter's
    state is ``step``, ``exp_avg`` and ``exp_avg_sq``. Dtypes as `FusedAdam`.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: decay rates of the running means of the gradient and of its square, in [0, 1).
        eps: added to the square root in the denominator.
        weight_decay: decoupled decay, inside the direction.
        maximize: ascend instead of descend.
        capturable: count steps beside the parameters, so that a CUDA graph may hold the step.
        foreach, fused: accepted and ignored.
        differentiable: False; a step is not differentiable.
        master_weights: compute bfloat16 and float16 parameters in float32 copies in the state.
        state_dtype: None stores states in the parameter's dtype; or torch.float32,
            torch.bfloat16, or "int8": 8 bits, in blocks of 256 values.
        stochastic_rounding: round bfloat16 parameters up or down so that the mean is kept.
        max_grad_norm: scale the gradients of a step down together to at most this norm.

    Raises:
        ValueError: for an argument out of range.
        RuntimeError: as `FusedAdam`.
    """

    _rule = _ops.lamb
    _sharded_call = ShardedLamb

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        master_weights: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        check_lr(lr)
        betas = checked_betas(betas)
        check_not_negative("epsilon value", eps)
        check_not_negative("weight_decay value", weight_decay)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "capturable": capturable,
                "foreach": foreach,
                "fused": fused,
                "differentiable": differentiable,
            },
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
        )

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return "exp_avg", "exp_avg_sq"

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "maximize": bool(group["maximize"]),
        }
