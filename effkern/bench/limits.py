"""The speed that memory allows: a plain pass with as many streams as the work has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effkern.backends import native
from effkern.bench.timers import Contestant, Rotation

#: By how many elements the buffers of a limit are staggered: a page and a cache line.
STAGGER = 1040


@dataclass(frozen=True)
class Streams:
    """One pass over equally large buffers.

    Attributes:
        reads: how many are read.
        writes: how many are written.
        in_place: whether the written ones are the first of those read, as in an optimizer's step.
            Otherwise they are allocated in the timed call, as the outputs of an op are.
    """

    reads: int
    writes: int
    in_place: bool = False


@dataclass(frozen=True)
class CopyLimit:
    """The limit as a contestant among the others.

    Attributes:
        contestant: makes all passes in one call.
        bytes_moved: in one call.
        streams: how many each pass reads and writes: "2r 1w".
    """

    contestant: Contestant
    bytes_moved: int
    streams: str


def moved_bytes(passes: Sequence[Streams], buffer_bytes: int) -> int:
    """What these passes over buffers of ``buffer_bytes`` bytes each read and write together."""
    return sum(streams.reads + streams.writes for streams in passes) * buffer_bytes


def copy_limit(passes: Sequence[Streams], *, buffer_bytes: int, device: torch.device) -> CopyLimit:
    """The limit for work that makes these passes over buffers of ``buffer_bytes`` bytes each.

    The buffers are float32 and hold zeros, whatever the work's dtype: only their bytes count. On a
    GPU, and without the CPU library, each pass is a `Tensor.copy_`: one stream read, one written.
    A pass that writes nothing is everywhere a `Tensor.sum` of each buffer: a compiler leaves out
    loads that nothing comes of.
    """
    native_pass = device.type == "cpu" and native.serves("CPU")
    if not native_pass:
        passes = [Streams(1, min(1, streams.writes)) for streams in passes]
    reads = max(streams.reads for streams in passes)
    elements = max(1, buffer_bytes // torch.float32.itemsize)

    def make() -> list[Tensor]:
        # Each buffer begins a little later in its memory than the one before: streams that are a
        # power of two apart would compete for the same banks, and no limit would be seen.
        room = elements + reads * STAGGER
        starts = [i * STAGGER for i in range(reads)]
        return [torch.zeros(room, device=device)[start : start + elements] for start in starts]

    def run(buffers: list[Tensor]) -> list[Tensor]:
        written = []
        for streams in passes:
            sources = buffers[: streams.reads]
            if streams.writes == 0:
                written += [source.sum() for source in sources]
                continue
            if streams.in_place:
                targets = sources[: streams.writes]
            else:
                targets = [torch.empty_like(sources[0]) for _ in range(streams.writes)]
            if native_pass:
                native.stream_limit(sources, targets)
            else:
                targets[0].copy_(sources[0])
            written += targets
        return written

    return CopyLimit(
        contestant=Contestant(run, Rotation(make, set_bytes=reads * buffer_bytes)),
        bytes_moved=moved_bytes(passes, buffer_bytes),
        streams=", ".join(f"{p.reads}r {p.writes}w" for p in passes),
    )
