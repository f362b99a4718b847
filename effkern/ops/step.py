"""The update rules' kernel ops: one step from lists of tensors, or by plan.

``_adam_`` takes every tensor and raises the version counters of those it writes; compiled graphs
(by way of `effkern.ops.deferred`), opcheck and the reference backend use it. ``_adam_planned_``
takes a table of addresses that `effkern.optim.plan` keeps between steps and `effkern.ops.plan` puts
the gradients in; what it writes is invisible to PyTorch, and its caller raises the version
counters. All rules have both, with the keyword arguments

    lr, lr_tensor         the learning rate; from a one-element tensor where there is one
    grad_scale            what gradients were multiplied by: they are divided by it on the way
    found_inf             nothing is updated or counted where it is not zero
    squares, max_norm     gradients are clipped: scaled down together to the norm ``max_norm``. The
                          sum of ``squares``, float64, is the sum of squares of all gradients (as
                          they are, multiplied by grad_scale), which ``_squares_`` writes there

and options of their own. A step counter is increased by one first; a list of none counts nothing.

States may be stored in another dtype than the parameters', all alike: float32, bfloat16, or 8 bits
in blocks of 256 values (csrc/math/quantize.h): int8 where they may be negative, else uint8, and
``scales`` has the float32 scales of the blocks, for all parameters of the first state, then of the
next. ``masters`` are float32 copies in which bfloat16 and float16 parameters are computed, and
``rounding_keys``, one per bfloat16 parameter, ask for stochastic rounding (csrc/math/rounding.h).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from effkern.backends.reference import rules as reference
from effkern.ops._declare import Family, declare, imported_at_first_call
from effkern.ops._versions import raise_versions
from effkern.ops.plan import PLAN, untraceable

_KEYWORDS = (
    "float lr, Tensor? lr_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None,"
    " Tensor? squares=None, float max_norm=0.0"
)


class RuleOps:
    """Declares the two ops of one update rule, and finds them.

    Args:
        name: of the rule; the ops are ``_NAME_`` and ``_NAME_planned_``.
        states: what the ops call the lists of state tensors, and whether their values may be
            negative.
        options: the rule's own keyword arguments, as a schema has them.

    Attributes:
        name: of the rule.
        states: what its lists of states are called.
        signed: for each whether its values may be negative.
        from_lists: the family of the op on lists.
        from_plan: the family of the op on plans.
    """

    def __init__(self, name: str, states: dict[str, bool], options: str) -> None:
        self.name, self.states = name, tuple(states)
        self.signed = tuple(states.values())
        lists = ", ".join(
            f"Tensor({mark}!)[] {state}" for mark, state in zip("bcd", states, strict=False)
        )
        declare(
            f"_{name}_",
            f"(Tensor(a!)[] params, Tensor[] grads, {lists}, Tensor(e!)[] steps,"
            " Tensor(f!)[] masters, Tensor(g!)[] scales, int[] rounding_keys, *,"
            f" {_KEYWORDS}, {options}) -> ()",
            fake=_nothing,
            reference=partial(reference.step_, name, self.states, self.signed),
            triton=partial(imported_at_first_call("effkern.backends.triton.step:step_"), name),
            in_cuda_graphs=False,
        )
        declare(
            f"_{name}_planned_",
            f"{PLAN}, *, {_KEYWORDS}, {options}) -> ()",
            fake=untraceable,
            reference=None,
            triton=partial(
                imported_at_first_call("effkern.backends.triton.step:step_planned_"), name
            ),
        )
        raise_versions(f"_{name}_")
        self.from_lists = Family(f"_{name}_")
        self.from_plan = Family(f"_{name}_planned_")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


adam = RuleOps(
    "adam",
    {"exp_avgs": True, "exp_avg_sqs": False, "max_exp_avg_sqs": False},
    "float beta1, float beta2, float eps, float weight_decay,"
    " bool decoupled, bool amsgrad, bool maximize, bool bias_correction",
)
sgd = RuleOps(
    "sgd",
    {"momentum_buffers": True},
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize",
)
adagrad = RuleOps(
    "adagrad", {"sums": False}, "float lr_decay, float eps, float weight_decay, bool maximize"
)
rmsprop = RuleOps(
    "rmsprop",
    {"square_avgs": False, "momentum_buffers": True, "grad_avgs": True},
    "float alpha, float eps, float weight_decay, float momentum, bool centered, bool maximize",
)
adadelta = RuleOps(
    "adadelta",
    {"square_avgs": False, "acc_deltas": False},
    "float rho, float eps, float weight_decay, bool maximize",
)
lion = RuleOps(
    "lion", {"exp_avgs": True}, "float beta1, float beta2, float weight_decay, bool maximize"
)
lamb = RuleOps(
    "lamb",
    {"exp_avgs": True, "exp_avg_sqs": False},
    "float beta1, float beta2, float eps, float weight_decay, bool maximize",
)

declare(
    "_squares_",
    "(Tensor(a!) squares, int place, Tensor[] grads) -> ()",
    fake=_nothing,
    reference=reference.squares_,
    triton=imported_at_first_call("effkern.backends.triton.squares:squares_"),
    in_cuda_graphs=False,
)
declare(
    "_squares_planned_",
    f"{PLAN}, Tensor(c!) squares, int place) -> ()",
    fake=untraceable,
    reference=None,
    triton=imported_at_first_call("effkern.backends.triton.squares:squares_planned_"),
)
squares_from_lists = Family("_squares_")
squares_from_plan = Family("_squares_planned_")
rules = (adam, sgd, adagrad, rmsprop, adadelta, lion, lamb)
