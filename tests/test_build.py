"""What the build promises: no torch in kernels, instruction sets kept apart, a stable ABI."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import effkern
from effkern.backends import build_info, native

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "cmake" / "CMakeFiles"


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, demangled name) of each symbol that `nm` lists."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "--demangle", "--format=posix", *options, str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    matches = (re.match(r"(.+?) ([A-Za-z])( [0-9a-f ]*)?$", line) for line in lines)
    return [(match[2], match[1]) for match in matches if match]


def library(key: str) -> Path:
    path = native.library_folder() / f"libeffkern_{key}.so"
    if not path.exists():
        pytest.skip(build_info.why_not_built(native.library_folder(), key))
    return path


@pytest.mark.parametrize("folder", ["common", "math", "cpu", "cuda"])
def test_kernels_include_no_torch_header(folder):
    sources = [path for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file()]
    assert sources
    for path in sources:
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))], path


@pytest.mark.parametrize("flag", ["-march=native", "-mcpu=native", "-ffast-math", "-Ofast"])
def test_nothing_is_tuned_to_the_building_machine(flag):
    for name in ("CMakeLists.txt", "setup.py", "Makefile", "pyproject.toml"):
        assert flag not in (ROOT / name).read_text(), name
    info = build_info.read(native.library_folder())
    assert flag not in str(info.get("cpu", {}).get("flags", []))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_no_code_can_leak_between_instruction_sets(isa):
    # A weak symbol, say an inline function that was not inlined, is merged by the linker: the copy
    # that survives may be the AVX-512 one, and kills the process on a machine without AVX-512.
    objects = list((OBJECTS / f"effkern_cpu_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip(f"no object files of {isa} under build/cmake: built elsewhere, or not at all")
    for path in objects:
        defined = symbols(path, "--defined-only", "--extern-only")
        assert not [name for kind, name in defined if kind in "WwVvuC"], path
        assert not [name for _, name in defined if f"::{isa}::" not in name], path


def test_the_check_for_leaks_sees_one(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "leak.cpp"
    source.write_text("inline int shared(int x) { return x + 1; }\nint (*address)(int) = shared;\n")
    subprocess.run([compiler, "-c", source, "-o", tmp_path / "leak.o"], check=True)
    assert ("W", "shared(int)") in symbols(tmp_path / "leak.o", "--defined-only")


@pytest.mark.parametrize("key", ["cpu", "cuda"])
def test_libraries_use_only_the_stable_abi(key):
    needed = symbols(library(key), "--dynamic", "--undefined-only")
    unstable = [name for _, name in needed if re.search(r"\b(at|c10|torch)::", name)]
    assert not unstable
    assert any(name.startswith(("aoti_torch_", "torch_")) for _, name in needed)


@pytest.mark.parametrize("key", ["cpu", "cuda"])
def test_libraries_export_nothing_by_accident(key):
    exported = symbols(library(key), "--dynamic", "--defined-only")
    strong = [name for kind, name in exported if kind in "TDBR"]
    assert not [name for name in strong if not name.startswith(("effkern_", "_init", "_fini"))]


def test_version_stands_in_one_place():
    info = build_info.read(native.library_folder())
    assert re.fullmatch(r"\d+\.\d+\.\d+", effkern.__version__)
    assert info.get("version", effkern.__version__) == effkern.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_build_info_of_a_folder_without_a_build(tmp_path):
    assert build_info.read(tmp_path) == {}
    assert "make build" in build_info.why_not_built(tmp_path, "cpu")
    assert all("not built" in line for line in build_info.describe(tmp_path))


def test_build_info_says_why_a_library_is_missing(tmp_path):
    (tmp_path / "build_info.json").write_text(
        '{"cpu": {"built": true, "compiler": "GNU 12", "instruction_sets": {"baseline": []}},'
        ' "cuda": {"built": false, "reason": "no nvcc"}}'
    )
    assert build_info.why_not_built(tmp_path, "cpu") == ""
    assert build_info.why_not_built(tmp_path, "cuda") == "no nvcc"
    assert build_info.describe(tmp_path) == [
        "CPU library: built by GNU 12 for baseline",
        "CUDA library: not built: no nvcc",
    ]
