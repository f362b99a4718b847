"""The text that the demo trains on, as one tensor of bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

#: Enough for some thousand steps of the default batch, read in a fraction of a second.
CORPUS_BYTES = 4_000_000

#: One byte of this many is held out to judge both models on.
HELD_OUT = 10


def standard_library(limit: int = CORPUS_BYTES) -> bytes:
    """The first ``limit`` bytes of the standard library's top-level modules, in order of name."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if not text:
        raise FileNotFoundError(f"no Python source in {folder}: give a text with --text FILE")
    return bytes(text[:limit])


def corpus(file: Path | None, context: int) -> tuple[Tensor, Tensor]:
    """The text to train on and the text held out, uint8 tensors of shape (bytes,).

    Args:
        file: any file, taken as bytes; None takes the standard library's source.
        context: bytes that the model sees at once; the held-out part must be longer.

    Raises:
        OSError: the file cannot be read.
        ValueError: the text is too short to train on.
    """
    raw = standard_library() if file is None else file.read_bytes()[:CORPUS_BYTES]
    text = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0)
    held_out = len(text) // HELD_OUT
    if held_out < context + 2:
        least = HELD_OUT * (context + 2)
        raise ValueError(
            f"--text {file}: {len(text)} bytes of text are too few, {least} are needed"
        )
    return text[:-held_out], text[-held_out:]


def batch(text: Tensor, generator: torch.Generator, *, size: int, context: int) -> Tensor:
    """``size`` random windows: int64 bytes of shape (size, context + 1), on the CPU."""
    starts = torch.randint(len(text) - context, (size, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()
