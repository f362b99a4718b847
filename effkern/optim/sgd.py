"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from effkern.ops import step as _ops
from effkern.optim.arguments import check_lr, check_not_negative
from effkern.optim.fused import FusedOptimizer
from effkern.optim.state import step_counter

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
    ) -> None:
        check_lr(lr)
        check_not_negative("momentum value", momentum)
        check_not_negative("weight_decay value", weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        self._steps: dict[Tensor, Tensor] = {}
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
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._steps = {}

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("momentum_buffer" if group["momentum"] != 0 else None,)

    def _counters(
        self, group: dict[str, Any], params: Sequence[Tensor], new: Sequence[bool]
    ) -> list[Tensor]:
        """Counters that no state holds, from which the kernel knows a buffer's first step."""
        if group["momentum"] == 0:
            return []
        for param, begins in zip(params, new, strict=True):
            if begins or param not in self._steps:
                self._steps[param] = step_counter(0.0 if begins else 1.0)
        return [self._steps[param] for param in params]

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "weight_decay": float(group["weight_decay"]),
            "nesterov": bool(group["nesterov"]),
            "maximize": bool(group["maximize"]),
        }
