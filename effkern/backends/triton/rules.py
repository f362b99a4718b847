"""The update rules in Triton: the formulas of csrc/math, on blocks in the accumulation type.

Of each rule the kernels take three functions:

    corrections(t, numbers) -> (first, second)
        what depends on the step, where its number lies on the device
    scalars(lr, first, second, numbers, ACC) -> tuple
        what one tensor needs at one step
    update(param, grad, state0, state1, state2, scalars, STATES) -> (param, state0, state1, state2)
        the formula

``numbers`` are `NUMBERS` of float64 that the host makes of the rule's options. ``STATES`` is a mask
of the states that the options keep; an update gives the others back as they came. LAMB, whose step
is scaled by norms of the whole tensor, has `lamb_advance` beside its update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from effkern.backends.triton.numerics import larger, quotient, root, scalar, sign_of

#: Room for what the host makes of a rule's options.
NUMBERS = 8

Numbers = tuple[float, ...]


class Form(NamedTuple):
    """What the options of a step ask for.

    Attributes:
        numbers: at most `NUMBERS`, for the kernels.
        kept: for each list of states whether it is kept.
    """

    numbers: Numbers
    kept: tuple[bool, ...]


class Rule(NamedTuple):
    """One update rule.

    Attributes:
        states: what its ops call the lists of states, and whether their values may be negative.
        form: makes the form of a step from the op's options.
        scalars: as above.
        update: as above.
        corrections: the two numbers that depend on the step, on the host; None if nothing does.
        device_corrections: as above; None if nothing depends on the step.
    """

    states: dict[str, bool]
    form: Callable[..., Form]
    scalars: JITFunction
    update: JITFunction
    corrections: Callable[[float, Numbers], tuple[float, float]] | None = None
    device_corrections: JITFunction | None = None


@triton.jit
def signed_and_decayed(grad, param, sign, l2):
    """The gradient to descend, with L2 decay."""
    grad = grad * sign
    # An infinite parameter times no decay is not NaN.
    return tl.where(l2 != 0, grad + param * l2, grad)


# ---- Adam ----


@triton.jit
def adam_scalars(lr, rbias1, rsqrt_bias2, numbers, ACC: tl.constexpr):
    """Adam's; numbers as `_adam` makes them."""
    beta1, beta2, eps, decay, l2, sign, _log_beta1, _log_beta2 = numbers
    return (
        scalar(1.0 - beta1, ACC),
        scalar(beta2, ACC),
        scalar(1.0 - beta2, ACC),
        scalar(eps, ACC),
        scalar(1.0 - lr * decay, ACC),
        scalar(l2, ACC),
        scalar(sign, ACC),
        scalar(lr * rbias1, ACC),
        scalar(rsqrt_bias2, ACC),
    )


@triton.jit
def adam_update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars, STATES: tl.constexpr):
    """Adam, AdamW; a third state makes it AMSGrad."""
    one_minus_beta1, beta2, one_minus_beta2, eps, shrink, l2, sign, step_size, rsqrt_bias2 = scalars
    grad = signed_and_decayed(grad, param, sign, l2)
    param = param * shrink
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * one_minus_beta2 * grad
    second = exp_avg_sq
    if STATES & 4:
        max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq)
        second = max_exp_avg_sq
    param = param - quotient(exp_avg * step_size, root(second) * rsqrt_bias2 + eps)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def bias_corrections(t, numbers):
    """1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), of Adam and LAMB."""
    _beta1, _beta2, _eps, _decay, _l2, _sign, log_beta1, log_beta2 = numbers
    rbias1 = 1.0 / (1.0 - tl.exp(t * log_beta1))
    return rbias1, 1.0 / tl.sqrt(1.0 - tl.exp(t * log_beta2))


def _bias_corrections(t: float, numbers: Numbers) -> tuple[float, float]:
    log_beta1, log_beta2 = numbers[6:]
    return -1.0 / math.expm1(t * log_beta1), 1.0 / math.sqrt(-math.expm1(t * log_beta2))


def _logs(*betas: float) -> Numbers:
    return tuple(math.log(beta) if beta else -math.inf for beta in betas)


def _adam(
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    bias_correction: bool,
) -> Form:
    decay, l2 = (weight_decay, 0.0) if decoupled else (0.0, weight_decay)
    # Without a bias there is nothing to correct.
    logs = _logs(beta1, beta2) if bias_correction else _logs(0.0, 0.0)
    return Form((beta1, beta2, eps, decay, l2, _sign(maximize), *logs), (True, True, amsgrad))


# ---- SGD ----


@triton.jit
def sgd_scalars(lr, keep, take, numbers, ACC: tl.constexpr):
    """SGD's; numbers as `_sgd` makes them."""
    _momentum, _dampening, l2, sign, ahead, through, _, _ = numbers
    return (
        scalar(lr, ACC),
        scalar(l2, ACC),
        scalar(sign, ACC),
        scalar(keep, ACC),
        scalar(take, ACC),
        scalar(ahead, ACC),
        scalar(through, ACC),
    )


@triton.jit
def sgd_update(param, grad, buffer, state1, state2, scalars, STATES: tl.constexpr):
    """SGD; its state makes it SGD with momentum."""
    lr, l2, sign, keep, take, ahead, through = scalars
    grad = signed_and_decayed(grad, param, sign, l2)
    if STATES & 1:
        buffer = buffer * keep + grad * take
        # An infinite gradient times 0 is NaN.
        grad = tl.where(through != 0, grad + buffer * ahead, buffer)
    return param - grad * lr, buffer, state1, state2


@triton.jit
def buffer_weights(t, numbers):
    """Of the buffer and of the gradient in the new buffer, which begins as the gradient."""
    momentum, dampening, _l2, _sign, _ahead, _through, _, _ = numbers
    return tl.where(t == 1, 0.0, momentum), tl.where(t == 1, 1.0, 1.0 - dampening)


def _buffer_weights(t: float, numbers: Numbers) -> tuple[float, float]:
    momentum, dampening = numbers[:2]
    return (0.0, 1.0) if t == 1 else (momentum, 1.0 - dampening)


def _sgd(
    momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool
) -> Form:
    ahead, through = (momentum, 1.0) if nesterov else (1.0, 0.0)
    numbers = (momentum, dampening, weight_decay, _sign(maximize), ahead, through)
    return Form(numbers, (momentum != 0,))


# ---- Adagrad ----


@triton.jit
def adagrad_scalars(lr, decayed, _one, numbers, ACC: tl.constexpr):
    """Adagrad's; numbers as `_adagrad` makes them."""
    _lr_decay, eps, l2, sign, _, _, _, _ = numbers
    return scalar(lr * decayed, ACC), scalar(eps, ACC), scalar(l2, ACC), scalar(sign, ACC)


@triton.jit
def adagrad_update(param, grad, total, state1, state2, scalars, STATES: tl.constexpr):
    """Adagrad."""
    step_size, eps, l2, sign = scalars
    grad = signed_and_decayed(grad, param, sign, l2)
    total = total + grad * grad
    return param - quotient(grad * step_size, root(total) + eps), total, state1, state2


@triton.jit
def decayed_lr(t, numbers):
    """What is left of lr, and 1."""
    lr_decay, _eps, _l2, _sign, _, _, _, _ = numbers
    return 1.0 / (1.0 + (t - 1.0) * lr_decay), scalar(1.0, tl.float64)


def _decayed_lr(t: float, numbers: Numbers) -> tuple[float, float]:
    return 1.0 / (1.0 + (t - 1.0) * numbers[0]), 1.0


def _adagrad(lr_decay: float, eps: float, weight_decay: float, maximize: bool) -> Form:
    return Form((lr_decay, eps, weight_decay, _sign(maximize)), (True,))


# ---- RMSprop ----


@triton.jit
def rmsprop_scalars(lr, _one, _other, numbers, ACC: tl.constexpr):
    """RMSprop's; numbers as `_rmsprop` makes them."""
    alpha, eps, l2, momentum, sign, _, _, _ = numbers
    return (
        scalar(lr, ACC),
        scalar(alpha, ACC),
        scalar(1.0 - alpha, ACC),
        scalar(eps, ACC),
        scalar(momentum, ACC),
        scalar(l2, ACC),
        scalar(sign, ACC),
    )


@triton.jit
def rmsprop_update(param, grad, square_avg, buffer, grad_avg, scalars, STATES: tl.constexpr):
    """RMSprop; its second state gives it momentum, its third makes it centred."""
    lr, alpha, one_minus_alpha, eps, momentum, l2, sign = scalars
    grad = signed_and_decayed(grad, param, sign, l2)
    square_avg = square_avg * alpha + grad * one_minus_alpha * grad
    second = square_avg
    if STATES & 4:
        grad_avg = grad_avg + (grad - grad_avg) * one_minus_alpha
        # Rounding can bring it below 0.
        second = larger(square_avg - grad_avg * grad_avg, 0.0)
    step = quotient(grad, root(second) + eps)
    if STATES & 2:
        buffer = buffer * momentum + step
        step = buffer
    return param - step * lr, square_avg, buffer, grad_avg


def _rmsprop(
    alpha: float, eps: float, weight_decay: float, momentum: float, centered: bool, maximize: bool
) -> Form:
    numbers = (alpha, eps, weight_decay, momentum, _sign(maximize))
    return Form(numbers, (True, momentum != 0, centered))


# ---- Adadelta ----


@triton.jit
def adadelta_scalars(lr, _one, _other, numbers, ACC: tl.constexpr):
    """Adadelta's; numbers as `_adadelta` makes them."""
    rho, eps, l2, sign, _, _, _, _ = numbers
    return (
        scalar(lr, ACC),
        scalar(rho, ACC),
        scalar(1.0 - rho, ACC),
        scalar(eps, ACC),
        scalar(l2, ACC),
        scalar(sign, ACC),
    )


@triton.jit
def adadelta_update(param, grad, square_avg, acc_delta, state2, scalars, STATES: tl.constexpr):
    """Adadelta."""
    lr, rho, one_minus_rho, eps, l2, sign = scalars
    grad = signed_and_decayed(grad, param, sign, l2)
    square_avg = square_avg * rho + grad * one_minus_rho * grad
    delta = quotient(root(acc_delta + eps), root(square_avg + eps)) * grad
    acc_delta = acc_delta * rho + delta * one_minus_rho * delta
    return param - delta * lr, square_avg, acc_delta, state2


def _adadelta(rho: float, eps: float, weight_decay: float, maximize: bool) -> Form:
    return Form((rho, eps, weight_decay, _sign(maximize)), (True, True))


# ---- Lion ----


@triton.jit
def lion_scalars(lr, _one, _other, numbers, ACC: tl.constexpr):
    """Lion's; numbers as `_lion` makes them."""
    beta1, beta2, decay, sign, _, _, _, _ = numbers
    return (
        scalar(lr, ACC),
        scalar(1.0 - lr * decay, ACC),
        scalar(beta1, ACC),
        scalar(1.0 - beta1, ACC),
        scalar(beta2, ACC),
        scalar(1.0 - beta2, ACC),
        scalar(sign, ACC),
    )


@triton.jit
def lion_update(param, grad, exp_avg, state1, state2, scalars, STATES: tl.constexpr):
    """Lion."""
    lr, shrink, beta1, one_minus_beta1, beta2, one_minus_beta2, sign = scalars
    grad = grad * sign
    toward = exp_avg * beta1 + grad * one_minus_beta1
    exp_avg = exp_avg * beta2 + grad * one_minus_beta2
    return param * shrink - sign_of(toward) * lr, exp_avg, state1, state2


def _lion(beta1: float, beta2: float, weight_decay: float, maximize: bool) -> Form:
    return Form((beta1, beta2, weight_decay, _sign(maximize)), (True,))


# ---- LAMB ----


@triton.jit
def lamb_scalars(_lr, rbias1, rsqrt_bias2, numbers, ACC: tl.constexpr):
    """LAMB's; numbers as `_lamb` makes them."""
    beta1, beta2, eps, decay, _l2, sign, _log_beta1, _log_beta2 = numbers
    return (
        scalar(beta1, ACC),
        scalar(1.0 - beta1, ACC),
        scalar(beta2, ACC),
        scalar(1.0 - beta2, ACC),
        scalar(eps, ACC),
        scalar(decay, ACC),
        scalar(sign, ACC),
        scalar(rbias1, ACC),
        scalar(rsqrt_bias2, ACC),
    )


@triton.jit
def lamb_advance(grad, exp_avg, exp_avg_sq, scalars):
    """First pass: the new states."""
    beta1, one_minus_beta1, beta2, one_minus_beta2, _, _, sign, _, _ = scalars
    grad = grad * sign
    exp_avg = exp_avg * beta1 + grad * one_minus_beta1
    return exp_avg, exp_avg_sq * beta2 + grad * one_minus_beta2 * grad


@triton.jit
def lamb_direction(param, exp_avg, exp_avg_sq, scalars):
    """Both passes: where the parameter goes."""
    _, _, _, _, eps, decay, _sign, rbias1, rsqrt_bias2 = scalars
    r = quotient(exp_avg * rbias1, root(exp_avg_sq) * rsqrt_bias2 + eps)
    return tl.where(decay != 0, r + param * decay, r)


@triton.jit
def lamb_update(param, grad, exp_avg, exp_avg_sq, state2, scalars, STATES: tl.constexpr):
    """Second pass, with the step that the trust ratio gives; the states stay."""
    step_size, of_direction = scalars
    direction = lamb_direction(param, exp_avg, exp_avg_sq, of_direction)
    return param - direction * step_size, exp_avg, exp_avg_sq, state2


def _lamb(beta1: float, beta2: float, eps: float, weight_decay: float, maximize: bool) -> Form:
    numbers = (beta1, beta2, eps, weight_decay, 0.0, _sign(maximize), *_logs(beta1, beta2))
    return Form(numbers, (True, True))


def _sign(maximize: bool) -> float:
    return -1.0 if maximize else 1.0


#: By the name that the ops have.
RULES = {
    "adam": Rule(
        {"exp_avgs": True, "exp_avg_sqs": False, "max_exp_avg_sqs": False},
        _adam,
        adam_scalars,
        adam_update,
        _bias_corrections,
        bias_corrections,
    ),
    "sgd": Rule(
        {"momentum_buffers": True}, _sgd, sgd_scalars, sgd_update, _buffer_weights, buffer_weights
    ),
    "adagrad": Rule(
        {"sums": False}, _adagrad, adagrad_scalars, adagrad_update, _decayed_lr, decayed_lr
    ),
    "rmsprop": Rule(
        {"square_avgs": False, "momentum_buffers": True, "grad_avgs": True},
        _rmsprop,
        rmsprop_scalars,
        rmsprop_update,
    ),
    "adadelta": Rule(
        {"square_avgs": False, "acc_deltas": False}, _adadelta, adadelta_scalars, adadelta_update
    ),
    "lion": Rule({"exp_avgs": True}, _lion, lion_scalars, lion_update),
    "lamb": Rule(
        {"exp_avgs": True, "exp_avg_sqs": False},
        _lamb,
        lamb_scalars,
        lamb_update,
        _bias_corrections,
        bias_corrections,
    ),
}
