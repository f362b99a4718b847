"""The tests that name no backend, on the CUDA sources built with AddressSanitizer and
UndefinedBehaviorSanitizer: no access out of bounds or at an address that does not allow it, nothing
undefined.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.simt import build


@pytest.mark.skipif(not build.sanitizes(), reason="no C++ compiler with AddressSanitizer")
@pytest.mark.skipif(bool(os.environ.get(build.SANITIZE)), reason="this is the sanitized run")
def test_the_suite_under_the_sanitizers() -> None:
    folders = [str(build.ROOT / "tests" / name) for name in ("ops", "optim", "nn")]
    kernels = (
        "test_every_kernel.py",
        "test_device_counters.py",
        "test_storage.py",
        "test_clipping.py",
    )
    folders += [str(build.HERE / name) for name in kernels]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*pytest_, "-k", "simt", *folders],
        cwd=build.ROOT,
        env={**build.sanitized_environment(), "EFFKERN_TEST_BACKENDS": "simt"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert " passed" in result.stdout
