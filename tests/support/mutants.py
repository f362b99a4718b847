"""Broken stand-ins for kernels, to show that a suite would notice them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from effkern.backends import choice
from effkern.ops import _declare


@contextmanager
def mutant(name: str, **broken: Callable[..., Any]) -> Iterator[None]:
    """Run every op on a backend that is the reference, but for the kernel ops in ``broken``.

    Args:
        name: of the backend; each may be made once in a process.
        broken: kernel op, without its leading underscore, to a function that takes the reference
            implementation and then its arguments.
    """
    for op, (signature, fake, implementations) in _declare.declared.items():
        if "reference" not in implementations:
            continue
        reference = implementations["reference"]
        change = broken.get(op.strip("_"))

        def implementation(
            *args: Any, _change: Any = change, _reference: Any = reference, **kwargs: Any
        ) -> Any:
            return (
                _reference(*args, **kwargs)
                if _change is None
                else _change(_reference, *args, **kwargs)
            )

        _declare.define(f"{op}.{name}", signature, fake)
        _declare.library.impl(f"{op}.{name}", implementation, "CompositeExplicitAutograd")
    choice.test_backends.add(name)
    try:
        with choice.use_backend(name):
            yield
    finally:
        choice.test_backends.discard(name)
