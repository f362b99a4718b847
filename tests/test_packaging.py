"""What the archives contain, and what the set-up behind `make` says when a tool is missing."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["csrc", "effkern", "scripts", "tests", "benchmarks", "examples", "docs"]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, where builds may leave what they like."""
    skip = shutil.ignore_patterns("__pycache__", "lib", "*.so", "build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def python(checkout, *arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True
    )


def build(checkout, what):
    """The source archive and the wheel, as `python -m build` makes them."""
    result = python(
        checkout, "-m", "build", "--no-isolation", "--skip-dependency-check", EFFKERN_BUILD=what
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    (wheel,) = (checkout / "dist").glob("*.whl")
    with tarfile.open(archive) as file:
        inside = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    with zipfile.ZipFile(wheel) as file:
        return inside, wheel.name, set(file.namelist())


def test_archive_and_wheel_without_libraries(checkout):
    pytest.importorskip("build.env")
    inside, wheel, files = build(checkout, "none")
    assert inside >= {"CMakeLists.txt", "LICENSE", "Makefile", "setup.py", "effkern/py.typed"}
    for folder in ("csrc/cpu/kernels", "csrc/cuda", "csrc/math", "csrc/torch", "tests", "scripts"):
        assert any(name.startswith(folder + "/") for name in inside), folder
    assert wheel.startswith("effkern-")
    assert "-py3-none-" in wheel
    assert files >= {"effkern/__init__.py", "effkern/py.typed", "effkern/lib/build_info.json"}
    assert not [
        name for name in files if name.endswith(".so") or name.startswith(("tests", "csrc"))
    ]


@pytest.mark.slow
def test_wheel_with_the_cpu_library(checkout):
    pytest.importorskip("build.env")
    _, wheel, files = build(checkout, "cpu")
    assert "-py3-none-linux" in wheel
    assert "effkern/lib/libeffkern_cpu.so" in files


def test_unknown_build_is_refused(checkout):
    result = python(checkout, "setup.py", "-q", "build_ext", EFFKERN_BUILD="gpu")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last == "effkern: EFFKERN_BUILD is 'gpu'; it must be cpu, cuda or none"


def test_cuda_without_nvcc_fails_with_one_line(checkout):
    result = python(
        checkout, "setup.py", "-q", "build_ext", EFFKERN_BUILD="cuda", CUDACXX="/no/nvcc/here"
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("effkern: EFFKERN_BUILD=cuda, but no working nvcc was found")


@pytest.fixture
def environment_script():
    path = ROOT / "scripts" / "setup_environment.py"
    spec = importlib.util.spec_from_file_location("setup_environment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_missing_module_is_named(environment_script, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(SystemExit, match=f"Python's {missing} is missing.*python3-venv"):
        environment_script.check_tools()


def test_missing_compiler_is_named(environment_script, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("EFFKERN_BUILD", raising=False)
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler was found; install one"):
        environment_script.check_tools()
    monkeypatch.setenv("EFFKERN_BUILD", "none")
    environment_script.check_tools()


def test_old_python_is_named(environment_script, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"Python 3\.9 is too old; install 3\.10 or newer"):
        environment_script.check_tools()


def test_build_requirements_are_those_of_pyproject(environment_script):
    names = {requirement.split(">")[0] for requirement in environment_script.build_requirements()}
    assert names >= {"setuptools", "cmake", "ninja"}
    assert "torch" not in names


def test_stamps_notice_a_changed_source(environment_script, monkeypatch, tmp_path):
    monkeypatch.setattr(environment_script, "ROOT", tmp_path)
    source = tmp_path / "kernel.cpp"
    source.write_text("one")
    before = environment_script.fingerprint([source], ["torch"])
    stamps = environment_script.Stamps(tmp_path / "stamps.json")
    stamps.write("package", before)
    assert stamps.hold("package", environment_script.fingerprint([source], ["torch"]))
    assert not stamps.hold("package", environment_script.fingerprint([source], ["torch==2.13.0"]))
    source.write_text("two")
    assert not stamps.hold("package", environment_script.fingerprint([source], ["torch"]))
