"""The backends that the parametrised tests run on: each test names an op, never a backend.

Which ones: ``EFFKERN_TEST_BACKENDS``, a comma-separated list of the names below; by default all
that can run here.

    reference                           plain PyTorch
    cpu-baseline, cpu-avx2, cpu-avx512  the CPU library, one instruction set forced
    simt                                the CUDA sources on the CPU (tests/simt)
    triton                              on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)
    cuda                                on a GPU
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from effkern.backends import choice, native


@dataclass(frozen=True)
class Backend:
    """One backend under test.

    Attributes:
        name: as listed above.
        device: where its tensors live.
        slow: whether it interprets kernels, so that tests give it small sizes.
    """

    name: str
    device: str

    @property
    def slow(self) -> bool:
        return self.name == "simt" or (self.name == "triton" and self.device == "cpu")

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run every op inside on this backend."""
        effkern_name, _, isa = self.name.partition("-")
        before = native.cpu_isa()
        if isa:
            assert native.set_cpu_isa(isa)
        try:
            with choice.use_backend(effkern_name):
                yield
        finally:
            if isa and before:
                native.set_cpu_isa(before)


def available() -> list[Backend]:
    """Every backend that can run here."""
    found = [Backend("reference", "cpu")]
    before = native.cpu_isa()
    if before is not None:
        isas = [isa for isa in ("baseline", "avx2", "avx512") if native.set_cpu_isa(isa)]
        native.set_cpu_isa(before)
        found += [Backend(f"cpu-{isa}", "cpu") for isa in isas]
    if not choice.triton_interprets() and _simt_builds():
        found.append(Backend("simt", "cpu"))
    statuses = choice.backends()
    found += [
        Backend(name, statuses[name].devices[0])
        for name in ("cuda", "triton")
        if statuses[name].available
    ]
    return found


def _simt_builds() -> bool:
    try:
        from tests.simt import build
    except ImportError:
        return False
    return build.available()


def selected() -> list[Backend]:
    """What ``EFFKERN_TEST_BACKENDS`` asks for, or all that is available."""
    names = [name for name in os.environ.get("EFFKERN_TEST_BACKENDS", "").split(",") if name]
    found = {backend.name: backend for backend in available()}
    missing = [name for name in names if name not in found]
    if missing:
        raise RuntimeError(f"EFFKERN_TEST_BACKENDS asks for {missing}, which cannot run here")
    return [found[name] for name in names] if names else list(found.values())


def prepare(backend: Backend) -> None:
    """Load what a test backend needs beyond the package."""
    if backend.name == "simt":
        from tests.simt import build

        build.load()
    if backend.device == "cuda":
        torch.cuda.manual_seed_all(0)
