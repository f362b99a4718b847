"""Choosing a backend, and what is said of one that is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import effkern
from effkern.backends import choice, native
from effkern.nn.functional import rms_norm

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_backend_has_a_status() -> None:
    statuses = effkern.backends()
    assert list(statuses) == ["reference", "cpu", "cuda", "triton"]
    assert statuses["reference"].available
    for name, status in statuses.items():
        assert status.name == name
        assert status.available == (not status.reason) == bool(status.devices)
        assert status.available or status.remedy, f"{name} is missing and nobody says what to do"


def test_the_choice_holds_inside_the_block_alone() -> None:
    before = choice.requested()
    with effkern.use_backend("reference"):
        assert choice.requested() == "reference"
        with effkern.use_backend(None):
            assert choice.requested() is None
        assert choice.requested() == "reference"
    assert choice.requested() == before


def test_the_choice_is_the_thread_s_own() -> None:
    seen: list[str | None] = []
    with effkern.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choice.requested()))
        thread.start()
        thread.join()
    assert seen == [os.environ.get("EFFKERN_BACKEND")]


def test_the_choice_ends_with_an_exception() -> None:
    before = choice.requested()
    with pytest.raises(KeyError), effkern.use_backend("reference"):
        raise KeyError
    assert choice.requested() == before


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"unknown effkern backend 'cpp': choose one of reference"):
        effkern.use_backend("cpp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_backend_that_cannot_run_here() -> None:
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run here: .*; "):
        effkern.use_backend("cuda")


def test_a_backend_that_does_not_take_the_tensor() -> None:
    with (
        effkern.use_backend("cpu"),
        pytest.raises(RuntimeError, match="'cpu' takes cpu tensors here, got a tensor on meta"),
    ):
        rms_norm(torch.ones(2, 8, device="meta"), (8,))


def test_environment_variable() -> None:
    done = run(
        "import torch, effkern\n"
        "from effkern.backends import choice\n"
        "print(choice.requested(), effkern.nn.functional.rms_norm(torch.ones(2, 4), (4,)).sum())",
        EFFKERN_BACKEND="reference",
    )
    assert done.stdout.startswith("reference tensor("), done.stderr


def test_environment_variable_with_a_typing_error() -> None:
    """Importing never fails; the first op says what is wrong."""
    done = run(
        "import torch, effkern\n"
        "print('imported')\n"
        "effkern.nn.functional.rms_norm(torch.ones(2, 4), (4,))",
        EFFKERN_BACKEND="cpux",
    )
    assert done.stdout == "imported\n"
    assert "unknown effkern backend 'cpux'" in done.stderr


def test_forced_instruction_set() -> None:
    for isa in ("baseline", "avx2", "avx512"):
        if not native.set_cpu_isa(isa):
            continue
        done = run(
            "import effkern; from effkern.backends import native; print(native.cpu_isa())",
            EFFKERN_ISA=isa,
        )
        assert done.stdout.strip() == isa, done.stderr
    done = run(
        "import effkern; from effkern.backends import native; print(native.cpu_isa())",
        EFFKERN_ISA="mmx",
    )
    assert "EFFKERN_ISA=mmx is not an instruction set of this machine" in done.stderr
    assert done.stdout.strip() in ("baseline", "avx2", "avx512")


def test_without_any_library(tmp_path: Path) -> None:
    """Everything works in plain PyTorch, and the status says why and what to do."""
    code = """
import torch, effkern
status = effkern.backends()["cpu"]
assert not status.available and "was not built" in status.reason and status.remedy
x = torch.randn(3, 8, requires_grad=True)
effkern.nn.RMSNorm(8)(x).sum().backward()
p = torch.nn.Parameter(torch.ones(4)); p.grad = torch.ones(4)
effkern.FusedAdamW([p], lr=0.1).step()
assert p[0] < 1
op = torch.ops.effkern._rms_norm_forward.default
torch.library.opcheck(op, (x.detach(), None, None, 1, 1e-5))
print("works")
"""
    done = run(code, EFFKERN_LIBRARY_DIR=str(tmp_path))
    assert done.stdout == "works\n", done.stderr


def test_stream_limit_reads_and_writes() -> None:
    if native.cpu_isa() is None:
        pytest.skip("the CPU library is not built here")
    a, b, c = torch.randn(4096), torch.randn(4096), torch.empty(4096)
    native.stream_limit([a, b], [c])
    torch.testing.assert_close(c, a + b)
    with pytest.raises(ValueError, match="contiguous float32 CPU tensors of one length"):
        native.stream_limit([a, b[:100]], [c])
