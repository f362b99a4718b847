"""The CPU stand-in for CUDA finds the faults it is there to find."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.simt import build

pytestmark = pytest.mark.skipif(
    not build.sanitizes(), reason="no C++ compiler with AddressSanitizer"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("simt") / "broken_kernels"
    build.build_program(build.HERE / "broken_kernels.cu", path)
    return path


FAULTS = [
    "none",
    "no barrier",
    "leaves early",
    "shared overrun",
    "global overrun",
    "misaligned",
    "unwritten",
    "half warp",
]


def run(program: Path, fault: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(FAULTS.index(fault))]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_right_kernel_runs(program: Path) -> None:
    result = run(program, "none")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == 64


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("leaves early", "threads wait for others that do not come"),
        ("half warp", "threads wait for others that do not come"),
        ("shared overrun", "heap-buffer-overflow"),
        ("global overrun", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_a_fault_stops_the_run(program: Path, fault: str, message: str) -> None:
    result = run(program, fault)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize("fault", ["no barrier", "unwritten"])
def test_memory_that_nothing_wrote_is_nan(program: Path, fault: str) -> None:
    result = run(program, fault)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().lstrip("-") == "nan"
