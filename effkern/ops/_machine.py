"""What the machine's processor can do."""

from __future__ import annotations

import torch

#: Instructions that multiply numbers of 16 bits, of x86.
_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "amx_tile", "avx10_1", "avx10_2"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx10_1", "avx10_2"),
}


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has products of a 16-bit dtype, or may have: of processors other than
    x86 that is not asked.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        return True
    return any(has.get(name, False) for name in _PRODUCTS[dtype])
