"""`import effkern` works whatever is missing, loads nothing it does not need, and is quick."""

import os
import subprocess
import sys

import pytest

USE_BOTH_FAMILIES = """
import torch
import effkern
x = torch.randn(3, 8, requires_grad=True)
norm = effkern.nn.RMSNorm(8)
optimizer = effkern.FusedAdamW(norm.parameters())
expected = torch.nn.functional.rms_norm(x, (8,), norm.weight)
y = norm(x)
assert torch.allclose(y, expected, atol=1e-6)
y.square().sum().backward()
before = norm.weight.detach().clone()
optimizer.step()
assert not torch.equal(before, norm.weight)
"""


def run(code: str, **environment: str) -> str:
    """What `code` prints in a Python of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_any_library(tmp_path):
    reasons = "b = effkern.backends(); print(b['cpu'].available, b['reference'].available)"
    printed = run(USE_BOTH_FAMILIES + reasons, EFFKERN_LIBRARY_DIR=str(tmp_path))
    assert printed.split() == ["False", "True"]


def test_without_triton():
    # None in sys.modules makes `import triton` fail as if it were not installed.
    hide = "import sys; sys.modules['triton'] = None\n"
    run(hide + USE_BOTH_FAMILIES)


def test_loads_nothing_that_it_does_not_need():
    packages = ["triton", "matplotlib", "typer", "rich", "transformers", "safetensors", "psutil"]
    code = f"""
import sys
import torch
before = set(sys.modules)
import effkern
added = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(*(added & set({packages})))
unwanted = ("effkern.cli", "effkern.bench", "effkern.convert")
print(*(name for name in sys.modules if name.startswith(unwanted)))
"""
    assert run(code).split() == []


@pytest.mark.parametrize("library", ["built", "missing"])
def test_takes_at_most_0_3_seconds_beyond_torch(library, tmp_path):
    # Processor time, the least of three: a busy machine does not make the import slower.
    code = """
import time
import torch
start = time.process_time()
import effkern
print(time.process_time() - start)
"""
    environment = {"EFFKERN_LIBRARY_DIR": str(tmp_path)} if library == "missing" else {}
    assert min(float(run(code, **environment)) for _ in range(3)) <= 0.3
