"""Triton's interpreter in tests: a plugin that makes it faster, and counts of what kernels do.

Only for a process that has TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def pytest_configure() -> None:
    """Patch triton.language once for the whole process.

    The interpreter looks through all of it at each launch, and again at each call of a function by
    a kernel: most of the time that a small test takes.
    """
    patch_language = interpreter._patch_lang
    patched: set[int] = set()

    def patch_once(function: Callable[..., Any]) -> Any:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        languages = {id(module) for module in modules if module in (tl, tl.core)}
        if not languages or not languages <= patched:
            patch_language(function)
            patched.update(languages)
        return interpreter._LangPatchScope()  # has nothing to restore

    interpreter._patch_lang = patch_once


@dataclass
class Counts:
    """What kernels did: launches, and bytes of global memory that they read and wrote."""

    launches: int = 0
    read: int = 0
    written: int = 0


@contextmanager
def counting() -> Iterator[Counts]:
    """Count all launches, loads and stores inside."""
    counts = Counts()
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    launch = interpreter.GridExecutor.__call__

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        counts.launches += 1
        launch(self, *args, **kwargs)

    def counted_load(pointers: Any, mask: Any, *args: Any) -> Any:
        counts.read += _bytes(pointers, mask)
        return load(pointers, mask, *args)

    def counted_store(pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        counts.written += _bytes(pointers, mask)
        return store(pointers, value, mask, *args)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_launch),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
    ):
        yield counts


def _bytes(pointers: Any, mask: Any) -> int:
    active = np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape))
    return int(active) * pointers.get_element_ty().primitive_bitwidth // 8
