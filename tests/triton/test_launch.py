"""Tensors that the kernels cannot read are refused before a launch."""

from __future__ import annotations

import pytest
import torch

import effkern
from effkern.bench.machine_code import why_no_triton


@pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton())
def test_a_cpu_tensor_needs_the_interpreter() -> None:
    from effkern.backends.triton.adam import adam_
    from effkern.backends.triton.rms_norm import rms_norm_forward

    message = (
        "needs a CUDA tensor, or TRITON_INTERPRET=1 set before Python starts; got a CPU tensor"
    )
    with pytest.raises(RuntimeError, match=message):
        rms_norm_forward(torch.ones(2, 8), None, None, 1, 1e-6)
    scalars = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    flags = {"decoupled": False, "amsgrad": False, "maximize": False}
    tensors, steps = [torch.ones(3)], [torch.zeros(())]
    with pytest.raises(RuntimeError, match=message):
        adam_(tensors, tensors, tensors, tensors, [], steps, **scalars, **flags)
    assert torch.equal(tensors[0], torch.ones(3))
    assert steps[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the triton backend runs on the GPU here")
@pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton())
def test_the_backend_says_why_it_cannot_run() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), effkern.use_backend("triton"):
        pass
