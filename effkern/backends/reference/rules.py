"""The update rules in plain PyTorch: one tensor after another, every intermediate value in the
accumulation dtype, formulas as their papers or torch.optim write them.

Each rule is a function ``rule(param, grad, states, t, lr, **options)`` that returns the new
parameter and the new states; a state that the options do not ask for is None. ``t`` counts from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.backends.reference.lists import check_lists
from effkern.backends.reference.quantize import dequantized, quantized
from effkern.backends.reference.rounding import stochastically_rounded

States = list[Any]  # of Tensor, or None


def adam(
    p: Tensor,
    g: Tensor,
    states: States,
    t: float,
    lr: float,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    bias_correction: bool,
) -> tuple[Tensor, States]:
    """Kingma and Ba (2015), Loshchilov and Hutter (2019), Reddi et al. (2018)."""
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    g = _signed_and_decayed(g, p, maximize, 0.0 if decoupled else weight_decay)
    if decoupled:
        p = p * (1 - lr * weight_decay)
    exp_avg = exp_avg.lerp(g, 1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + (1 - beta2) * g * g
    second = exp_avg_sq
    if amsgrad:
        second = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    bias1, bias2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
    p = p - lr / bias1 * exp_avg / (second.sqrt() / math.sqrt(bias2) + eps)
    return p, [exp_avg, exp_avg_sq, max_exp_avg_sq]


def sgd(
    p: Tensor,
    g: Tensor,
    states: States,
    t: float,
    lr: float,
    *,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> tuple[Tensor, States]:
    """As torch.optim.SGD: a new momentum buffer begins as the gradient, undampened."""
    (buffer,) = states
    g = _signed_and_decayed(g, p, maximize, weight_decay)
    if momentum != 0:
        buffer = g if t == 1 else momentum * buffer + (1 - dampening) * g
        g = g + momentum * buffer if nesterov else buffer
    return p - lr * g, [buffer]


def adagrad(
    p: Tensor,
    g: Tensor,
    states: States,
    t: float,
    lr: float,
    *,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> tuple[Tensor, States]:
    """Duchi et al. (2011), as torch.optim.Adagrad."""
    (total,) = states
    g = _signed_and_decayed(g, p, maximize, weight_decay)
    total = total + g * g
    return p - lr / (1 + (t - 1) * lr_decay) * g / (total.sqrt() + eps), [total]


def rmsprop(
    p: Tensor,
    g: Tensor,
    states: States,
    t: float,
    lr: float,
    *,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    maximize: bool,
) -> tuple[Tensor, States]:
    """Tieleman and Hinton (2012), Graves (2013); the centred variance is at least 0."""
    square_avg, buffer, grad_avg = states
    g = _signed_and_decayed(g, p, maximize, weight_decay)
    square_avg = alpha * square_avg + (1 - alpha) * g * g
    second = square_avg
    if centered:
        grad_avg = grad_avg.lerp(g, 1 - alpha)
        second = (square_avg - grad_avg * grad_avg).clamp_min(0)
    step = g / (second.sqrt() + eps)
    if momentum != 0:
        step = buffer = momentum * buffer + step
    return p - lr * step, [square_avg, buffer, grad_avg]


def adadelta(
    p: Tensor,
    g: Tensor,
    states: States,
    t: float,
    lr: float,
    *,
    rho: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> tuple[Tensor, States]:
    """Zeiler (2012), as torch.optim.Adadelta."""
    square_avg, acc_delta = states
    g = _signed_and_decayed(g, p, maximize, weight_decay)
    square_avg = rho * square_avg + (1 - rho) * g * g
    delta = (acc_delta + eps).sqrt() / (square_avg + eps).sqrt() * g
    acc_delta = rho * acc_delta + (1 - rho) * delta * delta
    return p - lr * delta, [square_avg, acc_delta]


def lion(
    p: Tensor,
    g: Tensor,
    states: States,
    t: float,
    lr: float,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
) -> tuple[Tensor, States]:
    """Chen et al. (2023), Algorithm 2."""
    (exp_avg,) = states
    g = _signed_and_decayed(g, p, maximize, 0.0)
    toward = beta1 * exp_avg + (1 - beta1) * g
    exp_avg = beta2 * exp_avg + (1 - beta2) * g
    return p * (1 - lr * weight_decay) - lr * toward.sign(), [exp_avg]


def lamb(
    p: Tensor,
    g: Tensor,
    states: States,
    t: float,
    lr: float,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    as_stored: Callable[[States], States],
) -> tuple[Tensor, States]:
    """You et al. (2020), Algorithm 2; the trust ratio is 1 where a norm is 0.

    The direction comes from the states as they are stored, since kernels read them twice.
    """
    exp_avg, exp_avg_sq = states
    g = _signed_and_decayed(g, p, maximize, 0.0)
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = exp_avg_sq * beta2 + (1 - beta2) * g * g
    exp_avg, exp_avg_sq = as_stored([exp_avg, exp_avg_sq])
    # The root first: the mean divided by its bias may be larger than a float.
    r = exp_avg / (1 - beta1**t) / (exp_avg_sq.sqrt() / (1 - beta2**t) ** 0.5 + eps)
    if weight_decay != 0:
        r = r + weight_decay * p
    param_norm, norm = p.norm().item(), r.norm().item()
    ratio = 1.0 if param_norm == 0 or norm == 0 else param_norm / norm
    return p - lr * ratio * r, [exp_avg, exp_avg_sq]


def _signed_and_decayed(g: Tensor, p: Tensor, maximize: bool, weight_decay: float) -> Tensor:
    """The gradient to descend, with L2 decay."""
    if maximize:
        g = -g
    return g + weight_decay * p if weight_decay != 0 else g


_RULES: dict[str, Callable[..., tuple[Tensor, States]]] = {
    rule.__name__: rule for rule in (adam, sgd, adagrad, rmsprop, adadelta, lion, lamb)
}


def step_(
    rule: str,
    names: Sequence[str],
    signed: Sequence[bool],
    params: list[Tensor],
    grads: list[Tensor],
    *lists: Any,
    lr: float,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    squares: Tensor | None = None,
    max_norm: float = 0.0,
    **options: Any,
) -> None:
    """``effkern::_RULE_``: one step on every parameter, in place; tensors may have any strides.

    Args:
        rule: its name.
        names: of the lists of states.
        signed: for each, whether its values may be negative.
        params: the parameters.
        grads: their gradients; this and the lists of states match ``params`` in number and shapes.
        lists: for each name the states, an empty list where the options need none; then the step
            counters, one number each or none at all; masters; scales of states in 8 bits; keys of
            stochastic rounding.
        lr: learning rate.
        lr_tensor: the same in a tensor, instead.
        grad_scale: what the gradients were multiplied by.
        found_inf: nothing happens where it is not 0.
        squares: their sum is that of the squares of all gradients, where these are clipped.
        max_norm: to which norm.
        options: the rule's.

    Raises:
        RuntimeError: if the lists do not belong together; nothing was written.
    """
    *states, steps, masters, scales, keys = lists
    named = {n: s for n, s in zip(names, states, strict=True) if s}
    check_lists(params, grads, named, steps, masters)
    if found_inf is not None and found_inf.item() != 0:
        return
    rate = lr if lr_tensor is None else lr_tensor.item()
    scale = 1.0 if grad_scale is None else grad_scale.item()
    factor = 1 / scale
    if squares is not None:
        norm = squares.sum().sqrt().item() / scale
        factor *= 1.0 if max_norm / (norm + 1e-6) >= 1 else max_norm / (norm + 1e-6)
    kept = [s for s, one in enumerate(states) if one]
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        t = 1.0
        if steps:
            steps[i] += 1
            t = steps[i].item()
        acc = accumulation_dtype(param.dtype)
        source = masters[i] if masters else param
        g = grad.to(acc)
        if factor != 1:
            g = g * factor
        scale_of = {s: scales[k * len(params) + i] for k, s in enumerate(kept)} if scales else {}
        wide: States = [None] * len(states)
        for s in kept:
            stored = states[s][i]
            wide[s] = dequantized(stored, scale_of[s]) if scale_of else stored.to(acc)

        def as_stored(
            new: States, i: int = i, acc: torch.dtype = acc, scale_of: dict[int, Tensor] = scale_of
        ) -> States:
            """Put the states where they are kept, and give them back as they are read."""
            for s in kept:
                if scale_of:
                    codes, block_scales = quantized(new[s], signed[s])
                    states[s][i].copy_(codes)
                    scale_of[s].copy_(block_scales)
                    new[s] = dequantized(codes, block_scales)
                else:
                    states[s][i].copy_(new[s])
                    new[s] = states[s][i].to(acc)
            return new

        extra = {"as_stored": as_stored} if rule == "lamb" else {}
        updated, new = _RULES[rule](source.to(acc), g, wide, t, rate, **options, **extra)
        if masters:
            masters[i].copy_(updated)
        param.copy_(stochastically_rounded(updated, keys[i], t) if keys else updated)
        if rule != "lamb":
            as_stored(new)


def squares_(squares: Tensor, place: int, grads: list[Tensor]) -> None:
    """``effkern::_squares_``: the sum of squares of all gradients, into ``squares[place]``.

    Args:
        squares: float64, one dimension, on the gradients' device.
        place: which of its numbers is written.
        grads: of one dtype and device, of any strides.
    """
    total = sum((g.double().square().sum() for g in grads), squares.new_zeros(()))
    squares[place] = total
