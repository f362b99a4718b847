"""Stochastic rounding to bfloat16: csrc/math/rounding.h in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def stochastically_rounded(values: Tensor, key: int, t: float) -> Tensor:
    """Values rounded up or down to bfloat16, with probabilities that keep the mean.

    Args:
        values: float32, dense in memory: an element's index is its place there.
        key: of the tensor.
        t: the number of the step.

    Returns:
        bfloat16, of the same shape and strides; infinities and NaN as they are.
    """
    flat = values.as_strided((values.numel(),), (1,))
    index = torch.arange(flat.numel(), dtype=torch.int64, device=values.device)
    seed = _mix(torch.tensor(key & _WORD))
    seed = _mix(seed ^ ((key >> 32) & _WORD))
    seed = _mix(seed ^ (int(t) & _WORD))
    stream = seed.to(values.device) ^ _mix(index >> 32)
    random = _mix(_times(index & _WORD, 0x9E3779B9) + stream & _WORD)
    bits = flat.view(torch.int32).to(torch.int64) & _WORD
    rounded = (bits + (random & 0xFFFF) & _WORD) >> 16
    rounded = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded)  # as int16 has it
    result = rounded.to(torch.int16).view(torch.bfloat16)
    made = torch.empty_strided(
        values.shape, values.stride(), dtype=torch.bfloat16, device=values.device
    )
    chosen = torch.where(flat.isfinite(), result, flat.to(torch.bfloat16))
    made.as_strided((values.numel(),), (1,)).copy_(chosen)
    return made


def _mix(x: Tensor) -> Tensor:
    """``mix_bits`` of 32 bits kept in int64."""
    x = x ^ (x >> 16)
    x = _times(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _times(x, 0x846CA68B)
    return x ^ (x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    """The lower 32 bits of a product, which int64 cannot hold whole."""
    low = (x & 0xFFFF) * factor
    high = ((x >> 16) * factor & 0xFFFF) << 16
    return low + high & _WORD
