"""The process's memory, and giving what is free of it back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch


def release_free_memory(device: torch.device) -> bool:
    """Give freed memory back, so that the next allocation is a fresh one.

    Returns:
        False where that cannot be done: on the CPU it takes glibc's ``malloc_trim``.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return True
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def allocators(
    device: torch.device, *, fresh: bool = True
) -> dict[str, Callable[[], object] | None]:
    """What to do between two calls to meet each allocator; fresh only where that can be done."""
    if not fresh or not release_free_memory(device):
        return {"warm": None}
    return {"warm": None, "fresh": lambda: release_free_memory(device)}


def peak_process_memory() -> int | None:
    """The most main memory, in bytes, that this process held so far; None if the system is mute."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
