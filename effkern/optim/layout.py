"""How tensors lie in memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

_data_ptr, _is_contiguous, _nbytes = Tensor.data_ptr, Tensor.is_contiguous, attrgetter("nbytes")


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


def as_real(tensor: Tensor) -> Tensor:
    """The tensor itself, or a view of a complex one with a last dimension of two real numbers."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether the stretches of memory that these tensors span have any byte in common.

    Tensors with gaps count with the gaps, so that two may be said to share what they interleave.
    """
    begin = addresses(tensors)
    length = int64(list(map(_nbytes, tensors)))
    for i, contiguous in enumerate(map(_is_contiguous, tensors)):
        if not contiguous:
            length[i] = _span(tensors[i])
    begin, order = begin[length > 0].sort()
    return bool((begin[:-1] + length[length > 0][order][:-1] > begin[1:]).any())


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where the tensors begin: int64, one number each."""
    return int64(list(map(_data_ptr, tensors)))


def int64(values: Sequence[int]) -> Tensor:
    """A 1-d CPU tensor, whatever the default device; faster than `torch.tensor`."""
    return torch.frombuffer(array("q", values or [0]), dtype=torch.int64)[: len(values)]


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
