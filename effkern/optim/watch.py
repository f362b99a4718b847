"""Whether tensors still stand where they stood."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.backends import native


class Watch:
    """Notices when a tensor's address, dtype or number of elements is no longer what it was.

    Args:
        tensors: strided, on any devices; kept alive.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._native = 0
        if native.serves("CPU"):
            self._native = torch.ops.effkern._watch.default(tensors)
            unwatch = torch.ops.effkern._unwatch.default
            weakref.finalize(self, unwatch, self._native).atexit = False
        else:
            self._tensors = list(tensors)
            self._seen = self._look()

    def moved(self) -> bool:
        """Whether any tensor has changed since this was made."""
        if self._native:
            return bool(_watch_moved(self._native))
        return self._look() != self._seen

    def _look(self) -> list[tuple[object, ...]]:
        return [(t.data_ptr(), t.dtype, t.numel()) for t in self._tensors]


_watch_moved = torch.ops.effkern._watch_moved.default
