"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops import step as _ops
from effkern.optim.arguments import check_foreach, check_lr, check_not_negative, checked_betas
from effkern.optim.fused import FusedOptimizer

__all__ = ["FusedAdam", "FusedAdamW"]


class FusedAdam(FusedOptimizer):
    """Drop-in for `torch.optim.Adam`: same arguments, state_dict and result, in fused kernels.

    Adam as in Kingma and Ba (2015), Algorithm 1; with ``decoupled_weight_decay`` as in Loshchilov
    and Hutter (2019), Algorithm 2; with ``amsgrad`` as in Reddi et al. (2018). Parameters may be
    float32, float64, bfloat16, float16, complex64 or complex128 (as two real numbers each, as in
    torch.optim); the arithmetic is in float32, float64 for float64.

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
        capturable: count steps beside the parameters, so that a CUDA graph may hold the step.
        adam_w_mode: Apex's name of ``decoupled_weight_decay``; overrides it where given.
        bias_correction: Apex's: False uses the running means as they are.
        set_grad_none: Apex's: what ``zero_grad`` does without an argument; None is torch's way.
        foreach, fused: accepted and ignored, but that ``foreach`` without ``capturable`` takes no
            tensors as ``lr`` and ``betas``, as in torch.optim.
        differentiable: False; a step is not differentiable.
        master_weights: compute bfloat16 and float16 parameters in float32 copies in the state.
        state_dtype: None stores states in the parameter's dtype; or torch.float32,
            torch.bfloat16, or "int8": 8 bits, in blocks of 256 values.
        stochastic_rounding: round bfloat16 parameters up or down so that the mean is kept.
        max_grad_norm: scale the gradients of a step down together to at most this norm.

    Raises:
        ValueError: for an argument out of range, as torch.optim.Adam.
        RuntimeError: for ``differentiable=True``; from ``step`` for a parameter, gradient or state
            that the kernels do not take.
    """

    _rule = _ops.adam
    _step_supports_amp_scaling = True

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
        bias_correction: bool = True,
        set_grad_none: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        master_weights: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        check_foreach(lr, betas, foreach, capturable)
        check_lr(lr)
        check_not_negative("epsilon value", eps)
        betas = checked_betas(betas)
        check_not_negative("weight_decay value", weight_decay)
        if adam_w_mode is not None:
            decoupled_weight_decay = adam_w_mode
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
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
        )
        if not bias_correction:  # a key of its own only where Apex's option is used
            self.defaults["bias_correction"] = False
            for group in self.param_groups:
                group.setdefault("bias_correction", False)
        self._set_grad_none = set_grad_none

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Reset all gradients, to None unless ``set_to_none`` or ``set_grad_none`` is False."""
        if set_to_none is None:
            set_to_none = getattr(self, "_set_grad_none", None) is not False
        super().zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_set_grad_none": self._set_grad_none}

    def _states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "decoupled": bool(group["decoupled_weight_decay"]),
            "amsgrad": bool(group["amsgrad"]),
            "maximize": bool(group["maximize"]),
            "bias_correction": bool(group.get("bias_correction", True)),
        }


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
        bias_correction: bool = True,
        set_grad_none: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        master_weights: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
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
            bias_correction=bias_correction,
            set_grad_none=set_grad_none,
            foreach=foreach,
            fused=fused,
            differentiable=differentiable,
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
