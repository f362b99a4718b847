"""What a multi-tensor step keeps between calls: the addresses of everything but the gradients.

The layout of the tables is that of ``csrc/common/multi_tensor.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

#: Storage dtypes of the kernels, and their codes in ``csrc/common/dtype.h``.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

#: Elements in one block of GPU work.
CHUNK = 8192

_MOST_STATES = 3
_data_ptr = Tensor.data_ptr


class Plan:
    """One multi-tensor call: parameters of one dtype on one device, their states and step counters.

    Args:
        params: of one dtype and device, each dense in memory.
        states: for each kind of state, one tensor per parameter, of the parameter's dtype, shape and strides.
        steps: one 0-dim CPU tensor per parameter, all float32 or all float64.
        backend: which will run it; on "cpu" the table is read in place and there are no chunks.

    Attributes:
        table, device_table, chunks, layouts: what the planned op takes.
        tensors: everything a step writes, whose version counters its caller raises.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
        backend: str,
    ) -> None:
        self.tensors = [*params, *chain.from_iterable(states), *steps]
        self._addresses = list(map(_data_ptr, self.tensors))

        columns = [torch.zeros(len(params), dtype=torch.int64) for _ in range(3 + _MOST_STATES + 2)]
        columns[0] = torch.tensor([p.numel() for p in params])
        columns[1] = torch.tensor(list(map(_data_ptr, params)))
        for i, state in enumerate(states):
            columns[3 + i] = torch.tensor(list(map(_data_ptr, state)))
        columns[3 + _MOST_STATES] = torch.tensor(list(map(_data_ptr, steps)))
        self.table = torch.stack(columns, dim=1)

        layouts = [DTYPE_CODES[params[0].dtype], int(steps[0].dtype == torch.float64)]
        for p in params:
            layouts += [p.dim(), *p.shape, *p.stride()]
        self.layouts = torch.tensor(layouts, dtype=torch.int64)

        if backend == "cpu":
            self.device_table, self.chunks = self.table, torch.empty((0, 2), dtype=torch.int32)
        else:
            device = params[0].device
            self.device_table = self.table.to(device, copy=True)
            self.chunks = _chunks(columns[0]).to(device)

    def is_current(self) -> bool:
        """Whether every tensor still stands where it stood: ``.data =`` or a resized storage moves it."""
        return list(map(_data_ptr, self.tensors)) == self._addresses


def _chunks(numels: Tensor) -> Tensor:
    """(tensor, index of a stretch of `CHUNK` elements in it), int32, for each stretch of each tensor."""
    counts = (numels + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, torch.arange(len(tensor)) - first], dim=1).to(torch.int32)
