from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import effkern

#: What stands here is about streams, graphs, synchronisation and sizes, which no machine without a
#: GPU shows; values and gradients are in tests/ops and tests/optim, for every backend.
BACKENDS = ("cuda", "triton")


@pytest.fixture(params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """One backend that runs on a GPU, in use for the whole test."""
    name: str = request.param
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    status = effkern.backends()[name]
    if not status.available:
        pytest.skip(status.reason)
    with effkern.use_backend(name):
        yield name
