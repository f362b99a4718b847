"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops import step as _ops
from effkern.optim.arguments import check_lr, check_not_negative
from effkern.optim.fused import FusedOptimizer

__all__ = ["FusedRMSprop"]


class FusedRMSprop(FusedOptimizer):
    """Drop-in for `torch.optim.RMSprop`: same arguments, state_dict and result, in fused kernels.

    RMSprop as in Tieleman and Hinton (2012), centred as in Graves (2013). The centred variance is
    kept from falling below 0, where rounding can bring torch's, which is then NaN. Dtypes as
    `FusedAdam`.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: the learning rate, a float or a one-element tensor.
        alpha: decay rate of the running mean of squares.
        eps: added to the square root in the denominator.
        weight_decay: L2 penalty.
        momentum: what is kept of the momentum buffer at each step.
        centered: divide by the deviation instead of the root mean square.
        capturable: count steps beside the parameters, so that a CUDA graph may hold the step.
        foreach: accepted and ignored.
        maximize: ascend instead of descend.
        differentiable: False; a step is not differentiable.
        master_weights: compute bfloat16 and float16 parameters in float32 copies in the state.
        state_dtype: None stores states in the parameter's dtype; or torch.float32,
            torch.bfloat16, or "int8": 8 bits, in blocks of 256 values.
        stochastic_rounding: round bfloat16 parameters up or down so that the mean is kept.
        max_grad_norm: scale the gradients of a step down together to at most this norm.

    Raises:
        ValueError: for an argument out of range, as torch.optim.RMSprop.
        RuntimeError: as `FusedAdam`.
    """

    _rule = _ops.rmsprop

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        master_weights: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        check_lr(lr)
        check_not_negative("epsilon value", eps)
        check_not_negative("momentum value", momentum)
        check_not_negative("weight_decay value", weight_decay)
        check_not_negative("alpha value", alpha)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "alpha": alpha,
                "eps": eps,
                "centered": centered,
                "weight_decay": weight_decay,
                "capturable": capturable,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
            },
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
        )

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return (
            "square_avg",
            "momentum_buffer" if group["momentum"] > 0 else None,
            "grad_avg" if group["centered"] else None,
        )

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "alpha": float(group["alpha"]),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "momentum": float(group["momentum"]),
            "centered": bool(group["centered"]),
            "maximize": bool(group["maximize"]),
        }
