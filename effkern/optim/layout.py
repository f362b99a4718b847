"""How tensors lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of dimensions."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return True
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != filled:
                return False
            filled *= size
    return True


def lies_like(tensor: Tensor, like: Tensor) -> bool:
    """Whether a tensor of ``like``'s shape has its elements in the same order of memory.

    Strides count only where there is more than one element along them.
    """
    return like.numel() == 0 or all(
        size == 1 or tensor.stride(d) == like.stride(d) for d, size in enumerate(like.shape)
    )


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The same values in the order of memory of ``like``, a dense tensor of the same shape.

    Returns:
        ``tensor`` itself where it lies so already, else a copy in ``tensor``'s dtype, on its
        device.
    """
    if lies_like(tensor, like):
        return tensor
    return torch.empty_strided(
        like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether the stretches of memory that these tensors span have any byte in common.

    Tensors with gaps count with the gaps, so that two may be said to share what they interleave.
    """
    nonempty = [t for t in tensors if t.numel()]
    begin = torch.tensor([t.data_ptr() for t in nonempty], dtype=torch.int64, device="cpu")
    length = torch.tensor(list(map(_span, nonempty)), dtype=torch.int64, device="cpu")
    begin, order = begin.sort()
    return bool((begin[:-1] + length[order][:-1] > begin[1:]).any())


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
