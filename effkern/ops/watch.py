"""Whether tensors still stand where they stood: the ops behind `effkern.optim.watch`.

Implemented by the CPU library alone, for tensors on any device; no kernels, nothing to trace.
"""

from __future__ import annotations

from effkern.ops._declare import library

library.define("_watch(Tensor[] tensors) -> int")
library.define("_watch_moved(int watch) -> bool")
library.define("_unwatch(int watch) -> ()")
