"""What all optimizers check of their constructor's arguments, in torch.optim's words."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_lr(lr: float | Tensor) -> None:
    """Refuse a learning rate that is negative, NaN, or a tensor of more than one element.

    Raises:
        ValueError: as said.
    """
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    check_not_negative("learning rate", lr)


def check_not_negative(what: str, value: Any) -> None:
    """Refuse a negative number, or NaN.

    Raises:
        ValueError: as said; ``what`` is what the message calls it.
    """
    if not value >= 0.0:
        raise ValueError(f"Invalid {what}: {value}")


def checked_betas(betas: Any) -> tuple[float, float]:
    """The two decay rates of running means as floats.

    Raises:
        ValueError: if one is not in [0, 1).
    """
    pair = (float(betas[0]), float(betas[1]))
    for i, beta in enumerate(pair):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    return pair
