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


def check_foreach(lr: Any, betas: Any, foreach: bool | None, capturable: bool) -> None:
    """Refuse what torch.optim.Adam refuses: tensors for numbers with ``foreach`` alone.

    Raises:
        ValueError: as said.
    """
    for what, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if isinstance(value, Tensor) and foreach and not capturable:
            raise ValueError(
                f"{what} as a Tensor is not supported for capturable=False and foreach=True"
            )


def checked_betas(betas: Any) -> tuple[float, float]:
    """The two decay rates of running means as floats.

    Raises:
        ValueError: if one is not in [0, 1), a tensor of more than one element, or the only tensor.
    """
    tensors = [isinstance(beta, Tensor) for beta in betas]
    if any(tensors) and not all(tensors):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        if tensors[i] and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element")
    pair = (float(betas[0]), float(betas[1]))
    for i, beta in enumerate(pair):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    return pair
