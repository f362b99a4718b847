"""The ordinary suites on the Triton kernels, in Triton's interpreter, on a machine without a GPU.

In processes of their own: where the interpreter is on nothing can be compiled.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Two processes, which take about as long as each other.
SUITES = [
    [
        "tests/ops",
        "tests/nn",
        "tests/triton/test_numerics.py",
        "tests/triton/test_norm_softmax.py",
    ],
    [
        "tests/optim",
        "tests/triton/test_bytes_and_launches.py",
        "tests/triton/test_step_on_device.py",
        "tests/triton/test_storage_and_clipping.py",
    ],
]
#: Modules of which something must have run.
NEEDED = {
    "tests.ops.test_step",
    "tests.ops.test_step_storage",
    "tests.ops.test_norm",
    "tests.ops.test_norm_softmax",
    "tests.ops.test_norm_softmax_cross_entropy",
    "tests.triton.test_norm_softmax",
    "tests.optim.test_every_rule",
    "tests.triton.test_step_on_device",
    "tests.triton.test_storage_and_clipping",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_suites_in_the_interpreter(tmp_path: Path) -> None:
    reports = [tmp_path / f"report{i}.xml" for i in range(len(SUITES))]
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(_run, SUITES, reports))
    for run in runs:
        assert run.returncode == 0, _tail(run)
    missing = NEEDED - {name for report in reports for name in _ran(report)}
    assert not missing, f"nothing of {sorted(missing)} ran\n" + "\n".join(map(_tail, runs))


def _run(suites: list[str], report: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "EFFKERN_TEST_BACKENDS": "triton",
        "CUDA_VISIBLE_DEVICES": "",  # the interpreter's tensors lie on the CPU
    }
    command = [sys.executable, "-m", "pytest", *suites, "-q", "-k", "triton", "--tb=short"]
    command += ["-p", "tests.triton.interpreter", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def _ran(report: Path) -> set[str]:
    """The modules of tests that were not skipped."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {case.attrib["classname"] for case in cases if case.find("skipped") is None}


def _tail(run: subprocess.CompletedProcess[str]) -> str:
    return "\n".join((run.stdout + run.stderr).splitlines()[-80:])
