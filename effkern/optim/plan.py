"""The tables of a multi-tensor step: the addresses of everything but the gradients.

Their layout is that of ``csrc/common/multi_tensor.h``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.backends.table import (
    CHUNK,
    COLUMNS,
    DTYPES,
    KEY,
    MASTER,
    NUMEL,
    PARAM,
    SCALE0,
    STATE0,
    STEP,
)
from effkern.optim.layout import addresses, int64
from effkern.optim.storage import Storage


class Plan:
    """One multi-tensor call: parameters of one dtype on one device, their states and step counters.

    Args:
        params: of one dtype and device, each dense in memory.
        states: for each list of states that the kernel takes, one tensor per parameter, of the
            parameter's dtype, device, shape and order of memory; an empty list for one that is
            not kept.
        steps: one number per parameter, all float32 or all float64, all on the CPU or all beside
            the parameters; none at all where steps are not counted.
        storage: how states are stored.
        scales: for each list of states, the scales of those in 8 bits, one tensor per parameter;
            an empty list where there are none.
        masters: float32 masters, one per parameter, or none.
        rounding_keys: of stochastic rounding, one per parameter, or none.
        on_cpu: whether the CPU library will run it, which reads ``table`` in place and cuts the
            work by itself.

    Attributes:
        table: int64 (parameters, `COLUMNS`) on the CPU: a row of addresses for each parameter. The
            gradients' are filled in at each step.
        device_table: the same on the parameters' device; ``table`` itself with ``on_cpu``.
        chunks: int32 (blocks, 2) on the parameters' device: what each block of GPU work does; no
            blocks with ``on_cpu``.
        layouts: int64, what each parameter and gradient must look like.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
        storage: Storage,
        scales: Sequence[Sequence[Tensor]],
        masters: Sequence[Tensor],
        rounding_keys: Sequence[int],
        on_cpu: bool,
    ) -> None:
        # The device is named throughout, for torch.set_default_device.
        self.table = torch.zeros((len(params), COLUMNS), dtype=torch.int64, device="cpu")
        self.table[:, NUMEL] = int64([p.numel() for p in params])
        self.table[:, PARAM] = addresses(params)
        for i, state in enumerate(states):
            if state:
                self.table[:, STATE0 + i] = addresses(state)
        for i, of_state in enumerate(scales):
            if of_state:
                self.table[:, SCALE0 + i] = addresses(of_state)
        if steps:
            self.table[:, STEP] = addresses(steps)
        if masters:
            self.table[:, MASTER] = addresses(masters)
        if rounding_keys:
            self.table[:, KEY] = int64(rounding_keys)

        layouts = [DTYPES.index(params[0].dtype), _code_of(steps), *storage.codes()]
        for p in params:
            layouts += [p.dim(), *p.shape, *p.stride()]
        self.layouts = int64(layouts)

        if on_cpu:
            self.device_table = self.table
            self.chunks = torch.empty((0, 2), dtype=torch.int32, device="cpu")
        else:
            device = params[0].device
            self.device_table = self.table.to(device, copy=True)
            self.chunks = _chunks(self.table[:, NUMEL]).to(device)
        #: Where a CUDA graph finds the table again at each replay: page-locked memory.
        on_device = bool(steps) and not steps[0].is_cpu
        self._staging = self.table.pin_memory() if on_device and params[0].is_cuda else None

    def upload_for_graph(self) -> None:
        """Send the table to the device by a copy that a CUDA graph may hold.

        The plan must then live, and stay as it is, as long as the graph does.
        """
        if self._staging is not None:
            self._staging.copy_(self.table)
            self.device_table.copy_(self._staging, non_blocking=True)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first arguments of every op on plans."""
        return self.table, self.device_table, self.chunks, self.layouts


def _code_of(steps: Sequence[Tensor]) -> int:
    """What counters are made of and where they are, as ``Steps`` of csrc/torch/multi_tensor.h."""
    if not steps:
        return 0
    return int(steps[0].dtype == torch.float64) + 2 * (not steps[0].is_cpu)


def _chunks(numels: Tensor) -> Tensor:
    """(tensor, index of a stretch of `CHUNK` elements in it) for each stretch of each tensor.

    An empty tensor has one too, which counts its step.
    """
    counts = ((numels + CHUNK - 1) // CHUNK).clamp_min(1)
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    index = torch.arange(len(tensor), device="cpu") - first
    return torch.stack([tensor, index], dim=1).to(torch.int32)
