"""Stochastic gradient descent."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from effkern.ops import step as _ops
from effkern.optim.arguments import check_lr, check_not_negative
from effkern.optim.fused import FusedOptimizer

__all__ = ["FusedSGD"]


class FusedSGD(FusedOptimizer):
    """Drop-in for `torch.optim.SGD`: same arguments, state_dict and result, in fused kernels.

    Momentum as in Polyak (1964), Nesterov's as in Sutskever et al. (2013), with torch's
    conventions: a new momentum buffer begins as the gradient, undampened. Dtypes as `FusedAdam`.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: the learning rate, a float or a one-element tensor.
        momentum: what is kept of the momentum buffer at each step.
        dampening: what is held back of the gradient on its way into the buffer.
        weight_decay: L2 penalty.
        nesterov: look ahead along the buffer.
        maximize: ascend instead of descend.
        foreach, fused: accepted and ignored.
        differentiable: False; a step is not differentiable.
        master_weights: compute bfloat16 and float16 parameters in float32 copies in the state.
        state_dtype: None stores states in the parameter's dtype; or torch.float32,
            torch.bfloat16, or "int8": 8 bits, in blocks of 256 values.
        stochastic_rounding: round bfloat16 parameters up or down so that the mean is kept.
        max_grad_norm: scale the gradients of a step down together to at most this norm.

    Raises:
        ValueError: for an argument out of range, as torch.optim.SGD.
        RuntimeError: as `FusedAdam`.
    """

    _rule = _ops.sgd
    _keeps_step = False
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        check_lr(lr)
        check_not_negative("momentum value", momentum)
        check_not_negative("weight_decay value", weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "foreach": foreach,
                "differentiable": differentiable,
                "fused": fused,
            },
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
        )

    def __getstate__(self) -> dict[str, Any]:
        taken = super().__getstate__()
        if not all(self._steps.values()):
            saved = {param: self._saved(param, state) for param, state in self.state.items()}
            taken["state"] = defaultdict(dict, saved)
        return taken

    def _saved(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        # Without the buffer of a first step that was skipped: it is still to begin as the gradient.
        if self._steps.get(param, 1):
            return state
        return {k: value for k, value in state.items() if not k.startswith("momentum_buffer")}

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("momentum_buffer" if group["momentum"] != 0 else None,)

    def _needs_steps(self, group: dict[str, Any]) -> bool:
        # From them the kernel knows a buffer's first step.
        return group["momentum"] != 0

    def _steps_taken(self, state: dict[str, Any]) -> float:
        return float(any(key.startswith("momentum_buffer") for key in state))

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "weight_decay": float(group["weight_decay"]),
            "nesterov": bool(group["nesterov"]),
            "maximize": bool(group["maximize"]),
        }
