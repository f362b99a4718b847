"""Gradients enter a plan, in Python: for machines without the CPU library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.backends.table import DTYPES, GRAD, PARAM


def put_gradients_(
    table: Tensor,
    device_table: Tensor,
    layouts: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> int:
    """``effkern::_put_gradients_``: check all tensors, then put the gradients' addresses in place.

    Args:
        table: of the plan; its column of gradients is written.
        device_table: on the device where the tensors must be.
        layouts: of the plan.
        params: the parameters, which must be as planned and where they were.
        grads: their gradients, which must lie like them.

    Returns:
        0 if the addresses in the table stay what they were, 1 if one changed; -1 - i if tensor i is
        not as planned, and then nothing was written.

    Raises:
        RuntimeError: if there is not one parameter and gradient for each row of the table.
    """
    if not len(params) == len(grads) == len(table):
        raise RuntimeError(
            f"params has {len(params)} tensors and grads {len(grads)}; each must have one for each "
            f"of the {len(table)} rows of table"
        )
    numbers = layouts.tolist()
    dtype, place = DTYPES[numbers[0]], 4
    planned = table[:, PARAM].tolist()
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        ndim = numbers[place]
        shape = numbers[place + 1 : place + 1 + ndim]
        strides = numbers[place + 1 + ndim : place + 1 + 2 * ndim]
        place += 1 + 2 * ndim
        if param.data_ptr() != planned[i]:
            return -1 - i
        for tensor in (param, grad):
            if tensor.dtype != dtype or tensor.device != device_table.device:
                return -1 - i
            if list(tensor.shape) != shape or not _lies(tensor, strides):
                return -1 - i
    addresses = torch.tensor([grad.data_ptr() for grad in grads], dtype=torch.int64, device="cpu")
    changed = not torch.equal(table[:, GRAD], addresses)
    table[:, GRAD] = addresses
    return int(changed)


def _lies(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether strides are as given; one along a single element does not count."""
    return tensor.numel() == 0 or all(
        size == 1 or has == must
        for size, has, must in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )
