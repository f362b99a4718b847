"""Builds and loads the CUDA sources for the CPU: the backend named "simt".

The unmodified ``csrc/cuda/*.cu`` and ``csrc/torch/cuda*.cpp`` are compiled with a C++ compiler
against ``simt.h``, and register themselves as the overloads ``simt`` of the kernel ops. Libraries
are kept in ``build/simt`` under a hash of all that goes into them.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

#: Set in the processes that `sanitized_environment` describes.
SANITIZE = "EFFKERN_SIMT_SANITIZE"


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def available() -> bool:
    """Whether the library can be built here."""
    return sys.platform == "linux" and compiler() is not None and _torch_include().is_dir()


def sanitizes() -> bool:
    """Whether it can be built with AddressSanitizer, in a way that a Python process can load."""
    if not available():
        return False
    command = [str(compiler()), "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return os.path.isabs(found)  # a bare name where the compiler has no such library


def sanitized_environment() -> dict[str, str]:
    """The environment of a Python process that loads the library with AddressSanitizer and
    UndefinedBehaviorSanitizer; builds it.
    """
    linked = subprocess.run(
        ["ldd", str(build(sanitize=True))], capture_output=True, text=True, check=True
    ).stdout
    first = [re.search(rf"{name}\S* => (\S+)", linked) for name in ("libasan", "libstdc\\+\\+")]
    return {
        **os.environ,
        SANITIZE: "1",
        "LD_PRELOAD": " ".join(found[1] for found in first if found),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python itself leaks
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


@dataclass(frozen=True)
class Counts:
    """What the kernels did to global memory.

    Attributes:
        read, written: bytes that went through ``load`` and ``store`` of csrc/cuda/memory.cuh.
        launches: of kernels.
        uploaded: bytes that the host copied to the device.
    """

    read: int
    written: int
    launches: int
    uploaded: int


class Simt:
    """The loaded library, outside its ops."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.simt_seed.argtypes = [ctypes.c_uint64]
        self._library.simt_kernels.restype = ctypes.c_int64

    def reset(self) -> None:
        """Count from zero."""
        self._library.simt_reset()

    def counts(self) -> Counts:
        """What has happened since `reset`."""
        four = (ctypes.c_int64 * 4)()
        self._library.simt_counts(four)
        return Counts(*four)

    def seed(self, seed: int) -> None:
        """Choose the order in which blocks and threads run."""
        self._library.simt_seed(seed)

    def kernels(self) -> int:
        """How many different kernels have been launched since the library was loaded."""
        return int(self._library.simt_kernels())


@cache
def load() -> Simt:
    """Build the library if need be, define the overloads ``simt`` and load it; once in a process.

    In an environment from `sanitized_environment`, the library built with the sanitizers.
    """
    from effkern.backends import choice
    from effkern.ops import _declare

    path = build(sanitize=bool(os.environ.get(SANITIZE)))
    for name, (signature, fake, _) in _declare.declared.items():
        _declare.define(f"{name}.simt", signature, fake)
    torch.ops.load_library(str(path))
    choice.test_backends.add("simt")
    return Simt(path)


def build(*, sanitize: bool) -> Path:
    """The library's path, built unless it is there."""
    sources = [
        *sorted(ROOT.glob("csrc/cuda/*.cu")),
        *sorted(ROOT.glob("csrc/torch/cuda*.cpp")),
        HERE / "simt.cpp",
        HERE / "simt_torch.cpp",
    ]
    # At run time the loader takes the libtorch_cpu that `import torch` has loaded.
    link = ["-shared", "-L", str(_torch_include().parent / "lib"), "-ltorch_cpu"]
    folder = ROOT / "build" / "simt" / _key(sanitize)
    return _build(sources, link, folder / "libeffkern_simt.so", sanitize)


def build_program(source: Path, path: Path) -> Path:
    """Build a file with kernels and a ``main`` into a program at ``path``, with the sanitizers."""
    return _build([source, HERE / "simt.cpp"], [], path, sanitize=True)


def _build(sources: list[Path], link: list[str], path: Path, sanitize: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what runs the tests may do so in several processes
        return path if path.exists() else _compile(sources, link, path, sanitize)


def _compile(sources: list[Path], link: list[str], path: Path, sanitize: bool) -> Path:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = {source: f"{scratch}/{source.name}.o" for source in sources}

        def compile_one(source: Path) -> None:
            _run([*_command(source, sanitize), "-c", str(source), "-o", objects[source]])

        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(compile_one, sources))
        finished = Path(scratch) / path.name
        _run(
            [str(compiler()), *_sanitizers(sanitize), *objects.values(), *link, "-o", str(finished)]
        )
        finished.replace(path)  # at once: a process that is stopped leaves nothing half done
    return path


def _command(source: Path, sanitize: bool) -> list[str]:
    """How a source is compiled, but for its name and its object's."""
    command = [
        str(compiler()),
        *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden"),
        *("-ffp-contract=off", "-fno-omit-frame-pointer"),
        *_sanitizers(sanitize),
        *("-I", str(ROOT / "csrc"), "-isystem", str(_torch_include())),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"),
    ]
    if source.name.startswith("simt"):
        return command
    overload = ("-DEFFKERN_CUDA_KEY=CPU", '-DEFFKERN_CUDA_OVERLOAD=".simt"')
    standins = ("-I", str(HERE / "include"), "-include", str(HERE / "simt.h"))
    return [*command, "-DEFFKERN_SIMT", *overload, *standins, "-x", "c++"]


def _sanitizers(sanitize: bool) -> list[str]:
    return ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else []


def _key(sanitize: bool) -> str:
    """A hash of all that goes into the library."""
    digest = hashlib.sha256(repr((torch.__version__, compiler(), sanitize)).encode())
    folders = [ROOT / "csrc" / name for name in ("common", "cuda", "math", "torch")]
    files = [path for folder in [*folders, HERE] for path in folder.rglob("*.*")]
    for path in sorted(path for path in files if path.suffix in (".h", ".cuh", ".cu", ".cpp")):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def _torch_include() -> Path:
    return Path(torch.__file__).parent / "include"
