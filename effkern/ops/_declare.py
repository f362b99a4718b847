"""How an op is declared: one schema, one fake kernel, and an overload for each backend that Python chooses.

``torch.ops.effkern.NAME.default`` is what a call reaches unless somebody asked for a backend by name. For CPU and
CUDA tensors the shared libraries implement it (``csrc/torch``); where no library serves, `effkern.backends` fills the
gap. ``torch.ops.effkern.NAME.reference`` and ``.triton`` have the same schema and always run that backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effkern.backends import native

_library = torch.library.Library("effkern", "DEF")

#: Backends that are overloads beside ``default``, which belongs to the native libraries.
OVERLOADS = ("reference", "triton")

Implementation = Callable[..., Any]


def declare(name: str, signature: str, *, fake: Implementation, reference: Implementation, triton: Implementation) -> None:
    """Declare kernel op ``effkern::name``.

    Args:
        name: without the namespace.
        signature: the schema behind the name: ``"(Tensor x) -> Tensor"``.
        fake: gives outputs of the right shape, dtype and device without computing them.
        reference: the same in plain PyTorch, for any device.
        triton: the same in Triton; must import Triton only when called.
    """
    define(name, signature, fake)
    for backend, implementation in (("reference", reference), ("triton", triton)):
        overload = f"{name}.{backend}"
        define(overload, signature, fake)
        _library.impl(overload, implementation, "CompositeExplicitAutograd")
    for key in ("CPU", "CUDA"):
        if not native.serves(key):
            _library.impl(name, triton if key == "CUDA" and native.triton_works() else reference, key)


def define(name: str, signature: str, fake: Implementation) -> None:
    """Declare a schema and its fake kernel, with no implementation."""
    _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"effkern::{name}", fake, lib=_library)
