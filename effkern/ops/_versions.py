"""Version counters of tensors in mutable lists.

The dispatcher raises none for an op that writes to ``Tensor(a!)[]``, and opcheck does not notice.
"""

from __future__ import annotations

from typing import Any

import torch

from effkern.ops._declare import declared, library


def raise_versions(name: str) -> None:
    """Make ``effkern::name``, on every backend, raise the counters of the lists that it writes.

    Args:
        name: an op that `declare` or `define` declared, whose mutable arguments are lists of
            tensors.
    """
    for overload in ("default", *(declared[name][2] if name in declared else ())):
        op = getattr(getattr(torch.ops.effkern, name), overload)
        mutable = [
            i
            for i, argument in enumerate(op._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        library.impl(op, _raising(op, mutable), "ADInplaceOrView", with_keyset=True)


def _raising(op: torch._ops.OpOverload, mutable: list[int]) -> Any:
    def implementation(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        written = [t for i in mutable for t in args[i] if not t.is_inference()]
        torch.autograd.graph.increment_version(written)
        return result

    return implementation
