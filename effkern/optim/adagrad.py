"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops import step as _ops
from effkern.optim.arguments import check_lr, check_not_negative
from effkern.optim.fused import FusedOptimizer
from effkern.optim.state import create

__all__ = ["FusedAdagrad"]


class FusedAdagrad(FusedOptimizer):
    """Drop-in for `torch.optim.Adagrad`: same arguments, state_dict and result, in fused kernels.

    Adagrad as in Duchi et al. (2011). The state is made at once, as torch's is. Dtypes as
    `FusedAdam`.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: the learning rate, a float or a one-element tensor.
        lr_decay: step t has the learning rate lr / (1 + (t - 1) * lr_decay).
        weight_decay: L2 penalty.
        initial_accumulator_value: what the sums of squares begin with.
        eps: added to the square root in the denominator.
        foreach, fused: accepted and ignored.
        maximize: ascend instead of descend.
        differentiable: False; a step is not differentiable.
        master_weights: compute bfloat16 and float16 parameters in float32 copies in the state.
        state_dtype: None stores states in the parameter's dtype; or torch.float32,
            torch.bfloat16, or "int8": 8 bits, in blocks of 256 values.
        stochastic_rounding: round bfloat16 parameters up or down so that the mean is kept.
        max_grad_norm: scale the gradients of a step down together to at most this norm.

    Raises:
        ValueError: for an argument out of range, as torch.optim.Adagrad.
        RuntimeError: as `FusedAdam`.
    """

    _rule = _ops.adagrad
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        check_lr(lr)
        check_not_negative("lr_decay value", lr_decay)
        check_not_negative("weight_decay value", weight_decay)
        check_not_negative("initial_accumulator_value value", initial_accumulator_value)
        check_not_negative("epsilon value", eps)
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "eps": eps,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
                "fused": fused,
            },
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
        )
        for group in self.param_groups:
            create(self, group, group["params"])

    def share_memory(self) -> None:
        """Move the state to shared memory."""
        for state in self.state.values():
            for tensor in state.values():
                tensor.share_memory_()

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("sum",)

    def _initial(self, group: dict[str, Any]) -> float:
        return float(self.defaults["initial_accumulator_value"])  # one for all groups, as torch

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "lr_decay": float(group["lr_decay"]),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "maximize": bool(group["maximize"]),
        }
