"""The options that every command has."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch


def device_name(name: str | None) -> str | None:
    """Refuse what names no device; whether this machine has it is `open_device`'s question."""
    if name is not None and re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise typer.BadParameter(f"{name!r} is not cpu, cuda or cuda:N")
    return name


def output_file(file: Path | None) -> Path | None:
    """Refuse a file that cannot be written, before the work is done; makes its folder."""
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise typer.BadParameter(f"{file.parent}: {error.strerror}") from None
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise typer.BadParameter(f"{file} cannot be written")
    return file


Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.", callback=device_name)]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.", min=0)]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Write the result here as JSON.", callback=output_file, dir_okay=False
    ),
]


def open_device(name: str) -> torch.device:
    """The device that a command was asked to run on.

    Raises:
        RuntimeError: if this machine does not have it.
    """
    import torch

    device = torch.device(name)
    if device.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            raise RuntimeError(
                f"--device {name}: this PyTorch ({torch.__version__}) is built without CUDA"
            )
        if not torch.cuda.is_available():
            raise RuntimeError(f"--device {name}: PyTorch sees no GPU on this machine")
        if (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(
                f"--device {name}: this machine has {torch.cuda.device_count()} GPUs"
            )
        if device.index is not None:
            torch.cuda.set_device(device)
    return device
