"""The ordinary suites on the Triton kernels, in Triton's interpreter, on a machine without a GPU.

In a process of their own: where the interpreter is on nothing can be compiled.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITES = [
    "tests/ops",
    "tests/optim",
    "tests/nn",
    "tests/triton/test_bytes_and_launches.py",
    "tests/triton/test_numerics.py",
    "tests/triton/test_step_on_device.py",
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_suites_in_the_interpreter(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "EFFKERN_TEST_BACKENDS": "triton",
        "CUDA_VISIBLE_DEVICES": "",  # the interpreter's tensors lie on the CPU
    }
    command = [sys.executable, "-m", "pytest", *SUITES, "-q", "-k", "triton", "--tb=short"]
    command += ["-p", "tests.triton.interpreter", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    tail = "\n".join((run.stdout + run.stderr).splitlines()[-80:])
    assert run.returncode == 0, tail
    cases = ElementTree.parse(report).getroot().iter("testcase")
    ran = {
        case.attrib["classname"]
        for case in cases
        if "[triton" in case.attrib["name"] and case.find("skipped") is None
    }
    assert {"tests.ops.test_step", "tests.ops.test_rms_norm"} <= ran, f"{sorted(ran)}\n{tail}"
