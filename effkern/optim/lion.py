"""Lion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops import step as _ops
from effkern.optim.arguments import check_lr, check_not_negative, checked_betas
from effkern.optim.fused import FusedOptimizer

__all__ = ["FusedLion"]


class FusedLion(FusedOptimizer):
    """Lion (Chen et al., 2023, Algorithm 2): steps by the sign of an interpolated momentum.

        param   <- param - lr * (sign(beta1 * exp_avg + (1 - beta1) * grad) + weight_decay * param)
        exp_avg <- beta2 * exp_avg + (1 - beta2) * grad

    Each parameter's state is ``exp_avg``. Dtypes as `FusedAdam`; of complex parameters the real and
    the imaginary part have signs of their own.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: of the interpolation and of the running mean, in [0, 1).
        weight_decay: decoupled decay.
        maximize: ascend instead of descend.
        capturable: a CUDA graph may hold the step.
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

    _rule = _ops.lion
    _keeps_step = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
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
        check_not_negative("weight_decay value", weight_decay)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
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
        return ("exp_avg",)

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "beta1": float(beta1),
            "beta2": float(beta2),
            "weight_decay": float(group["weight_decay"]),
            "maximize": bool(group["maximize"]),
        }
