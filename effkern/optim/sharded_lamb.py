"""LAMB for parameters of which each process has a shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.backends.reference.quantize import dequantized, quantized
from effkern.backends.reference.rounding import stochastically_rounded
from effkern.ops.step import RuleOps
from effkern.optim.calls import ListedCall, Tensors
from effkern.optim.distributed import Sharding, total_over_shards
from effkern.optim.layout import as_real


class ShardedLamb(ListedCall):
    """A call of LAMB whose trust ratios need the norms of all shards together.

    The kernels know only the shards of one process, so this is in plain PyTorch: the states and the
    directions of all tensors, one sum of all norms over the processes, then the parameters. It
    keeps the directions of all its tensors at once, and waits for no device unless it rounds
    stochastically.

    Args:
        rule: LAMB's ops.
        tensors: what this process has of the parameters and their states.
        sharding: of all the parameters.
    """

    def __init__(self, rule: RuleOps, tensors: Tensors, sharding: Sharding) -> None:
        super().__init__(rule, tensors)
        self._tensors = tensors
        self._signed = rule.signed
        self._sharding = sharding

    def run(self, grads: list[Tensor], keywords: dict[str, Any]) -> None:
        """As `PlannedCall.run`."""
        self._update(**keywords)
        self._grads = []

    def _update(
        self,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        lr_tensor: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        squares: Tensor | None = None,
        max_norm: float = 0.0,
    ) -> None:
        skip = None if found_inf is None else found_inf.reshape(()) != 0
        factor = _factor(maximize, grad_scale, squares, max_norm)
        times, directions, norms = [], [], []
        for i, grad in enumerate(self._grads):
            t = self._count(i, skip)
            wide = accumulation_dtype(grad.dtype)
            g = grad.to(wide) * factor
            exp_avg, exp_avg_sq = (self._state(s, i).to(wide) for s in range(2))
            exp_avg = beta1 * exp_avg + (1 - beta1) * g
            exp_avg_sq = exp_avg_sq * beta2 + (1 - beta2) * g * g
            self._store(0, i, exp_avg, skip)
            self._store(1, i, exp_avg_sq, skip)
            value = self._value(i).to(wide)
            direction = exp_avg / (1 - beta1**t) / ((exp_avg_sq / (1 - beta2**t)).sqrt() + eps)
            if weight_decay != 0:
                direction = direction + weight_decay * value
            norms += [_norm(value), _norm(direction)]
            times.append(t)
            directions.append(direction)

        (sums,) = total_over_shards([torch.stack(norms).square()], [self._sharding])
        of_params, of_directions = sums.sqrt().view(-1, 2).unbind(1)
        ratios = torch.where(
            (of_params == 0) | (of_directions == 0), 1.0, of_params / of_directions
        )
        rate = lr if lr_tensor is None else lr_tensor.double().reshape(())
        for i, (direction, ratio) in enumerate(zip(directions, ratios.unbind(), strict=True)):
            value = self._value(i)
            self._move(i, value.to(direction.dtype) - rate * ratio * direction, times[i], skip)

    def _count(self, i: int, skip: Tensor | None) -> float | Tensor:
        """Count a step of tensor ``i``; a number where the counter is on the host."""
        step = self._tensors.steps[i]
        step += 1.0 if skip is None else (~skip).to(step)
        return step.item() if step.is_cpu else step.double()

    def _value(self, i: int) -> Tensor:
        """Parameter ``i``, from its master if it has one."""
        masters = self._tensors.masters
        return masters[i] if masters else as_real(self._params[i])

    def _move(self, i: int, value: Tensor, t: float | Tensor, skip: Tensor | None) -> None:
        if self._tensors.masters:
            _write(self._tensors.masters[i], value, skip)
        if self._tensors.storage.stochastic:
            value = stochastically_rounded(value, self._tensors.rounding_keys[i], float(t))
        _write(as_real(self._params[i]), value, skip)

    def _state(self, s: int, i: int) -> Tensor:
        stored = self._tensors.states[s][i]
        if self._tensors.storage.quantized:
            return dequantized(stored, self._tensors.scales[s][i])
        return as_real(stored)

    def _store(self, s: int, i: int, value: Tensor, skip: Tensor | None) -> None:
        stored = self._tensors.states[s][i]
        if self._tensors.storage.quantized:
            value, scales = quantized(value, self._signed[s])
            _write(self._tensors.scales[s][i], scales, skip)
        _write(as_real(stored), value, skip)


def _factor(
    maximize: bool, grad_scale: Tensor | None, squares: Tensor | None, max_norm: float
) -> float | Tensor:
    """What gradients are multiplied by: for their scale, for clipping, and to ascend."""
    factor: float | Tensor = -1.0 if maximize else 1.0
    scale = 1.0 if grad_scale is None else grad_scale.double().reshape(())
    if grad_scale is not None:
        factor = factor / scale
    if squares is not None:
        norm = squares.sum().sqrt() / scale
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return factor


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def _write(to: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Copy ``value`` to a tensor, unless the step is skipped."""
    to.copy_(value if skip is None else torch.where(skip, to, value.to(to.dtype)))
