"""The speed that memory allows: a plain pass with as many streams as the work has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effkern.backends import native
from effkern.bench.timers import Contestant, Rotation


@dataclass(frozen=True)
class Streams:
    """One pass over equally large buffers.

    Attributes:
        reads: how many are read.
        writes: how many are written.
        in_place: whether the written ones are the first of those read, as in an optimizer's step; a
            buffer that is only written costs a read as well on CPUs that fetch a cache line before
            they write to it.
    """

    reads: int
    writes: int
    in_place: bool = False


@dataclass(frozen=True)
class CopyLimit:
    """The limit as a contestant among the others, and what one call of it moves."""

    contestant: Contestant
    bytes_moved: int
    note: str


def copy_limit(passes: Sequence[Streams], *, buffer_bytes: int, device: torch.device) -> CopyLimit:
    """The limit for work that makes these passes over buffers of ``buffer_bytes`` bytes each.

    The buffers are float32 and hold zeros, whatever the work's dtype: only their bytes count.
    """
    native_pass = device.type == "cpu" and native.serves("CPU")
    if not native_pass:
        passes = [Streams(1, 1) for _ in passes]
    buffers = max(p.reads + (0 if p.in_place else p.writes) for p in passes)
    elements = max(1, buffer_bytes // torch.float32.itemsize)

    def make() -> list[tuple[list[Tensor], list[Tensor]]]:
        tensors = [torch.zeros(elements, device=device) for _ in range(buffers)]
        return [_assign(streams, tensors) for streams in passes]

    def run(assigned: list[tuple[list[Tensor], list[Tensor]]]) -> None:
        for reads, writes in assigned:
            if native_pass:
                native.stream_limit(reads, writes)
            else:
                writes[0].copy_(reads[0])

    return CopyLimit(
        contestant=Contestant(run, Rotation(make, set_bytes=buffers * buffer_bytes)),
        bytes_moved=sum(p.reads + p.writes for p in passes) * buffer_bytes,
        note="copy limit: " + ", then ".join(_describe(p, native_pass) for p in passes),
    )


def _assign(streams: Streams, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    reads = tensors[: streams.reads]
    if streams.in_place:
        return reads, reads[: streams.writes]
    return reads, tensors[streams.reads : streams.reads + streams.writes]


def _describe(streams: Streams, native_pass: bool) -> str:
    if not native_pass:
        return "Tensor.copy_ (1 stream read, 1 written)"
    where = " in place" if streams.in_place else ""
    return f"a pass that reads {streams.reads} streams and writes {streams.writes}{where}"
