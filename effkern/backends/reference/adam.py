"""Adam (Kingma and Ba, 2015), AdamW (Loshchilov and Hutter, 2019) and AMSGrad (Reddi et al., 2018),
as torch.optim writes them: one tensor after another, every intermediate value in the accumulation
dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effkern.backends.reference.dtypes import accumulation_dtype
from effkern.backends.reference.lists import check_lists


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """One step on every parameter, in place; the tensors may have any strides.

    Args:
        params: the parameters.
        grads: their gradients; this and the lists of states match ``params`` in number and shapes.
        exp_avgs: running means of the gradient.
        exp_avg_sqs: running means of its square.
        max_exp_avg_sqs: their largest values so far with ``amsgrad``, else an empty list.
        steps: one number each, increased by one first.
        lr: learning rate.
        beta1: decay rate of ``exp_avgs``.
        beta2: decay rate of ``exp_avg_sqs``.
        eps: added to the square root in the denominator.
        weight_decay: L2 penalty, or decoupled decay.
        decoupled: decay the parameter (AdamW) instead of the gradient (L2).
        amsgrad: divide by the largest running mean of squares.
        maximize: ascend.

    Raises:
        RuntimeError: if the lists do not belong together; nothing was written.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    check_lists(params, lists, steps)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        steps[i] += 1
        t = steps[i].item()
        bias1, bias2 = 1 - beta1**t, 1 - beta2**t
        acc = accumulation_dtype(param.dtype)
        p, g = param.to(acc), grad.to(acc)
        if maximize:
            g = -g
        if decoupled:
            p = p * (1 - lr * weight_decay)
        elif weight_decay != 0:
            g = g + weight_decay * p
        exp_avg = exp_avgs[i].to(acc).lerp(g, 1 - beta1)
        exp_avg_sq = exp_avg_sqs[i].to(acc) * beta2 + (1 - beta2) * g * g
        second = exp_avg_sq
        if amsgrad:
            second = torch.maximum(max_exp_avg_sqs[i].to(acc), exp_avg_sq)
            max_exp_avg_sqs[i].copy_(second)
        exp_avgs[i].copy_(exp_avg)
        exp_avg_sqs[i].copy_(exp_avg_sq)
        param.copy_(p - lr / bias1 * exp_avg / (second.sqrt() / math.sqrt(bias2) + eps))
