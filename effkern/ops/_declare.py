"""How an op is declared: one schema, one fake kernel, and an overload for each backend that Python
implements.

``torch.ops.effkern.NAME.default`` is what a call reaches unless somebody asked for a backend by
name. For CPU and CUDA tensors the shared libraries implement it (``csrc/torch``); `fill_gaps` gives
it an implementation where no library serves. ``torch.ops.effkern.NAME.reference`` and ``.triton``
have the same schema and always run that backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from effkern.backends import choice, native

Implementation = Callable[..., Any]

library = torch.library.Library("effkern", "DEF")

#: What the kernels take.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Everything `declare` declared: name -> (signature, fake, implementations by backend).
declared: dict[str, tuple[str, Implementation, dict[str, Implementation]]] = {}

#: Dispatch keys whose library implements an op; those of an op that is not here do, all of them.
_of_libraries: dict[str, tuple[str, ...]] = {}


def define(name: str, signature: str, fake: Implementation, *, in_cuda_graphs: bool = True) -> None:
    """Declare a schema and its fake kernel, with no implementation.

    Args:
        name: without the namespace.
        signature: the schema behind the name.
        fake: as `declare` takes it.
        in_cuda_graphs: whether Inductor may capture a call; not where it sends host memory that is
            gone at the replay.
    """
    tags = [torch.Tag.pt2_compliant_tag]
    if not in_cuda_graphs:
        tags.append(torch.Tag.cudagraph_unsafe)
    library.define(name + signature, tags=tags)
    torch.library.register_fake(f"effkern::{name}", fake, lib=library)


def declare(
    name: str,
    signature: str,
    *,
    fake: Implementation,
    reference: Implementation | None,
    triton: Implementation,
    in_cuda_graphs: bool = True,
    libraries: tuple[str, ...] = ("CPU", "CUDA"),
) -> None:
    """Declare kernel op ``effkern::name``.

    Args:
        name: without the namespace.
        signature: the schema behind the name: ``"(Tensor x) -> Tensor"``.
        fake: gives outputs of the right shape, dtype and device without computing them.
        reference: the same in plain PyTorch, for any device; None for an op that has no such form.
        triton: the same in Triton, `imported_at_first_call`.
        in_cuda_graphs: as `define` takes it.
        libraries: the dispatch keys for which the shared libraries implement it.
    """
    _of_libraries[name] = libraries
    implementations = {"triton": triton}
    if reference is not None:
        implementations["reference"] = reference
    define(name, signature, fake, in_cuda_graphs=in_cuda_graphs)
    for backend, implementation in implementations.items():
        define(f"{name}.{backend}", signature, fake, in_cuda_graphs=in_cuda_graphs)
        library.impl(f"{name}.{backend}", implementation, "CompositeExplicitAutograd")
    declared[name] = (signature, fake, implementations)


def declare_public(schema: str, function: Implementation) -> None:
    """Declare a public op that decomposes into ``function``, which is differentiable as it is."""
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, function, "CompositeImplicitAutograd")


def fill_gaps() -> None:
    """Give each declared op an implementation for tensors whose library is not loaded, or has none
    of it.
    """
    for key in ("CPU", "CUDA"):
        for name, (_, _, implementations) in declared.items():
            if native.serves(key) and key in _of_libraries[name]:
                continue
            backend = choice.default_backend(key.lower())
            if native.serves(key):
                backend = "triton" if key == "CUDA" and choice.has_triton() else "reference"
            if backend in implementations:
                library.impl(name, implementations[backend], key)


def imported_at_first_call(where: str) -> Implementation:
    """The function at "module:function", whose module may be missing or slow to import."""
    module, function = where.split(":")

    def implementation(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return implementation


class Family:
    """The kernel ops of one family, as the chosen backend implements them."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self._default = self._overloads("default")

    def _overloads(self, overload: str) -> tuple[torch._ops.OpOverload, ...]:
        return tuple(getattr(getattr(torch.ops.effkern, name), overload) for name in self._names)

    def __call__(self, tensor: torch.Tensor) -> tuple[torch._ops.OpOverload, ...]:
        """The overloads to call for arguments on ``tensor``'s device, in the order of the names.

        Raises:
            RuntimeError: if the backend asked for does not take tensors of that device.
        """
        if choice.requested() is None:
            return self._default
        backend = choice.serving(tensor.device.type)
        return self._default if backend in ("cpu", "cuda") else self._overloads(backend)
