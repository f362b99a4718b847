"""Optimizer state in 8 bits, in blocks of 256 values: csrc/math/quantize.h in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.backends.table import QUANTIZED_BLOCK


def quantized(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks of values, in their order of memory.

    Args:
        values: floating-point, dense in memory; at least 0 where not ``signed``.
        signed: linear codes in [-127, 127], else the square root in [0, 255].

    Returns:
        Codes, int8 or uint8 of the values' shape and strides; scales, float32 (blocks,): each
        block's largest magnitude.
    """
    flat = _in_memory_order(values).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % QUANTIZED_BLOCK))
    blocks = blocks.view(-1, QUANTIZED_BLOCK)
    scales = blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)
    if signed:
        per_scale = torch.where(scales > 0, (127 / scales).clamp_max(_LARGEST), 0)
        codes = (blocks * per_scale[:, None]).round().to(torch.int8)
    else:
        per_root = torch.where(scales > 0, 255 / scales.sqrt(), 0)
        codes = (blocks.sqrt() * per_root[:, None]).round()
        codes = torch.where((blocks > 0) & (codes < 1), 1, codes).to(torch.uint8)
    made = torch.empty_strided(
        values.shape, values.stride(), dtype=codes.dtype, device=values.device
    )
    _in_memory_order(made).copy_(codes.view(-1)[: flat.numel()])
    return made, scales


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values that codes stand for.

    Args:
        codes: int8 or uint8, dense in memory.
        scales: float32, one for each block of them in their order of memory.

    Returns:
        float32, of the codes' shape and strides.
    """
    flat = _in_memory_order(codes)
    scale = scales.repeat_interleave(QUANTIZED_BLOCK)[: flat.numel()]
    if codes.dtype == torch.int8:
        values = flat.float() * (scale * (1 / 127))
    else:
        values = flat.float().square() * (scale * (1 / 65025))
    made = torch.empty_strided(
        codes.shape, codes.stride(), dtype=torch.float32, device=codes.device
    )
    _in_memory_order(made).copy_(values)
    return made


_LARGEST = torch.finfo(torch.float32).max


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor as the one-dimensional view of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
