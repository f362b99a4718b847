"""What every Triton op does before a launch."""

from __future__ import annotations

import contextlib

import torch
import triton

#: No products fused with sums: the compiler fuses other ones in each branch of a kernel, and what a
#: step gives would depend on whether its tensors lie at multiples of 16 bytes.
COMPILER_OPTIONS = {"enable_fp_fusion": False}


def device_guard(tensor: torch.Tensor, op: str) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are launched on ``tensor``'s device.

    Raises:
        RuntimeError: the kernels cannot read this tensor where it is.
    """
    interpreted = bool(triton.knobs.runtime.interpret)
    if tensor.device.type == "cpu" and not interpreted:
        raise RuntimeError(
            f"{op}: the triton backend needs a CUDA tensor, or TRITON_INTERPRET=1 set before "
            "Python starts; got a CPU tensor"
        )
    if tensor.device.type != "cpu" and interpreted:
        raise RuntimeError(
            f"{op}: under TRITON_INTERPRET=1 the triton backend needs a CPU tensor; got one on "
            f"{tensor.device}"
        )
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
