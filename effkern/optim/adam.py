"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from effkern.ops import adam as _ops
from effkern.optim.fused import FusedOptimizer

__all__ = ["FusedAdam", "FusedAdamW"]


class FusedAdam(FusedOptimizer):
    """Drop-in for `torch.optim.Adam`: same arguments, state_dict and result, in fused kernels.

    Adam as in Kingma and Ba (2015), Algorithm 1; with ``decoupled_weight_decay`` as in Loshchilov
    and Hutter (2019), Algorithm 2; with ``amsgrad`` as in Reddi et al. (2018). Parameters may be
    float32, float64, bfloat16 or float16; the arithmetic is in float32, float64 for float64.

    Args:
        params: parameters, named parameters or parameter groups, as every
            `torch.optim.Optimizer` takes them.
        lr: the learning rate, a float or a one-element tensor.
        betas: decay rates of the running means of the gradient and of its square, in [0, 1).
        eps: added to the square root in the denominator.
        weight_decay: L2 penalty, or decoupled decay.
        amsgrad: divide by the largest running mean of squares so far.
        decoupled_weight_decay: AdamW: decay the parameter instead of adding to its gradient.
        maximize: ascend instead of descend.
        capturable: False; a step inside a captured CUDA graph is not supported.
        adam_w_mode: Apex's name of ``decoupled_weight_decay``; overrides it where given.
        foreach, fused: accepted and ignored.
        differentiable: False; a step is not differentiable.

    Raises:
        ValueError: for an argument out of range, as torch.optim.Adam.
        RuntimeError: for ``capturable=True`` or ``differentiable=True``; from ``step`` for a
            parameter, gradient or state that the kernels do not take.
    """

    _from_lists = _ops.from_lists
    _from_plan = _ops.from_plan
    _scheduled = staticmethod(_ops.scheduled)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        adam_w_mode: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        betas = (float(betas[0]), float(betas[1]))
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
                "decoupled_weight_decay": decoupled_weight_decay
                if adam_w_mode is None
                else adam_w_mode,
            },
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in (
                ("amsgrad", False),
                ("maximize", False),
                ("decoupled_weight_decay", False),
            ):
                group.setdefault(name, default)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return _AMSGRAD_STATES if group["amsgrad"] else _STATES

    def _list_arguments(self, states: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        return [*states] if len(states) == len(_AMSGRAD_STATES) else [*states, []]

    def _scalars(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "decoupled": bool(group["decoupled_weight_decay"]),
            "amsgrad": bool(group["amsgrad"]),
            "maximize": bool(group["maximize"]),
        }


_STATES = ("exp_avg", "exp_avg_sq")
_AMSGRAD_STATES = (*_STATES, "max_exp_avg_sq")


class FusedAdamW(FusedAdam):
    """Drop-in for `torch.optim.AdamW`: `FusedAdam` with decoupled weight decay, by default 1e-2."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            decoupled_weight_decay=True,
            maximize=maximize,
            capturable=capturable,
            foreach=foreach,
            fused=fused,
            differentiable=differentiable,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
