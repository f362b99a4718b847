"""Loads the shared libraries that the build put beside the package, and talks to them outside the
op path.

``libeffkern_cpu`` implements the kernel ops for CPU tensors, ``libeffkern_cuda`` for CUDA tensors.
Both register with PyTorch's dispatcher when they are loaded (``csrc/torch``). A library that is
missing or does not load is no error here: `why_not` keeps the reason, for `effkern.backends` and
    ``effkern doctor``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from effkern.backends import build_info

__all__ = [
    "cpu_isa",
    "library_folder",
    "library_path",
    "serves",
    "set_cpu_isa",
    "stream_limit",
    "why_not",
]

_NAMES = {"CPU": "libeffkern_cpu.so", "CUDA": "libeffkern_cuda.so"}
_reasons: dict[str, str] = {}
_cpu: ctypes.CDLL | None = None


def library_folder() -> Path:
    """Where the libraries are looked for: the package's ``lib``, or ``EFFKERN_LIBRARY_DIR``."""
    override = os.environ.get("EFFKERN_LIBRARY_DIR")
    return Path(override) if override else Path(__file__).resolve().parent.parent / "lib"


def library_path(key: str) -> Path:
    """Where the library for dispatch key ``"CPU"`` or ``"CUDA"`` is looked for."""
    return library_folder() / _NAMES[key]


def serves(key: str) -> bool:
    """Whether the library for dispatch key ``"CPU"`` or ``"CUDA"`` is loaded."""
    return key not in _reasons


def why_not(key: str) -> str:
    """Why the library for ``key`` is not loaded; empty where it is."""
    return _reasons.get(key, "")


def _load(key: str) -> None:
    path = library_path(key)
    if key == "CUDA" and torch.version.cuda is None:
        _reasons[key] = "this PyTorch is built without CUDA"
    elif not path.exists():
        reason = build_info.why_not_built(path.parent, key.lower()) or "it is not there"
        _reasons[key] = f"{path.name} was not built: {reason}"
    else:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            _reasons[key] = f"{path.name} does not load: {error}"


def load() -> None:
    """Load what is there. Called once, after the ops are declared."""
    global _cpu
    for key in _NAMES:
        _load(key)
    if serves("CPU"):
        _cpu = ctypes.CDLL(str(library_path("CPU")))
        _cpu.effkern_cpu_isa.restype = ctypes.c_char_p
        _cpu.effkern_set_cpu_isa.argtypes = [ctypes.c_char_p]
        _cpu.effkern_set_cpu_isa.restype = ctypes.c_bool
        addresses = ctypes.POINTER(ctypes.c_void_p)
        _cpu.effkern_cpu_bandwidth.argtypes = [
            addresses,
            ctypes.c_int64,
            addresses,
            ctypes.c_int64,
            ctypes.c_int64,
        ]
        _cpu.effkern_cpu_bandwidth.restype = None


def cpu_isa() -> str | None:
    """The CPU kernels' instruction set: avx512, avx2 or baseline; None without the library."""
    return None if _cpu is None else _cpu.effkern_cpu_isa().decode()


def set_cpu_isa(name: str) -> bool:
    """Make the CPU kernels use instruction set ``name``; False where it cannot be had."""
    return _cpu is not None and _cpu.effkern_set_cpu_isa(name.encode())


def stream_limit(reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
    """One pass over memory: read all of ``reads``, write all of ``writes``, next to no arithmetic.

    What a benchmark holds a kernel against. Uses PyTorch's threads and the kernels' own vector
    loads and stores.

    Args:
        reads: 1 to 8 contiguous float32 CPU tensors of one length.
        writes: 1 to 8 of the same, which may be among ``reads``.

    Raises:
        RuntimeError: without the CPU library.
        ValueError: if a tensor is not as described.
    """
    if _cpu is None:
        raise RuntimeError(f"the CPU library is not loaded: {why_not('CPU')}")
    tensors = [*reads, *writes]
    if not 1 <= len(reads) <= 8 or not 1 <= len(writes) <= 8:
        raise ValueError(
            f"stream_limit takes 1 to 8 reads and 1 to 8 writes, got {len(reads)} and {len(writes)}"
        )
    for tensor in tensors:
        if (
            tensor.dtype != torch.float32
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
            or tensor.numel() != tensors[0].numel()
        ):
            raise ValueError("stream_limit takes contiguous float32 CPU tensors of one length")

    def addresses(of: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * len(of))(*(tensor.data_ptr() for tensor in of))

    _cpu.effkern_cpu_bandwidth(
        addresses(reads), len(reads), addresses(writes), len(writes), tensors[0].numel()
    )
