"""Tensors that the kernels cannot read are refused before a launch."""

from __future__ import annotations

import pytest
import torch

import effkern
from effkern.bench.machine_code import why_no_triton

ADAGRAD = {"lr": 1e-3, "lr_decay": 0.0, "eps": 1e-8, "weight_decay": 0.0, "maximize": False}


@pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton())
def test_a_cpu_tensor_needs_the_interpreter() -> None:
    from effkern.backends.triton.norm import rms_norm_forward
    from effkern.backends.triton.step import step_

    message = (
        "needs a CUDA tensor, or TRITON_INTERPRET=1 set before Python starts; got a CPU tensor"
    )
    with pytest.raises(RuntimeError, match=message):
        rms_norm_forward(torch.ones(2, 8), None, None, None, 1, 1e-6)
    tensors, steps = [torch.ones(3)], [torch.zeros(())]
    with pytest.raises(RuntimeError, match=message):
        step_("adagrad", tensors, tensors, tensors, steps, [], [], [], **ADAGRAD)
    assert torch.equal(tensors[0], torch.ones(3))
    assert steps[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the triton backend runs on the GPU here")
@pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton())
def test_the_backend_says_why_it_cannot_run() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), effkern.use_backend("triton"):
        pass


@pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton())
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"found_inf": "meta"}, "found_inf needs step counters on the parameters' device"),
        ({"found_inf": "cpu"}, "found_inf is on cpu; it must be on the parameters' device"),
        ({"grad_scale": "cpu"}, "grad_scale is on cpu; it must be on the parameters' device"),
    ],
)
def test_numbers_must_be_where_the_kernel_reads_them(
    keywords: dict[str, str], message: str
) -> None:
    from effkern.backends.triton.step import step_

    tensors, steps = [torch.ones(3, device="meta")], [torch.zeros(())]
    numbers = {name: torch.zeros((), device=device) for name, device in keywords.items()}
    with pytest.raises(RuntimeError, match=message):
        step_("adagrad", tensors, tensors, tensors, steps, [], [], [], **ADAGRAD, **numbers)
    assert steps[0] == 0
