"""The commands put together, and what happens to a failure."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from effkern.cli import bench, convert, demo, doctor
from effkern.version import __version__

app = typer.Typer(
    name="effkern",
    help="Kernels that make training and inference cheaper, beside stock PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.add_typer(bench.app, name="bench")
app.command("convert")(convert.convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"effkern {__version__}")
        raise typer.Exit()


@app.callback()
def effkern(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Kernels that make training and inference cheaper, beside stock PyTorch."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status; see `effkern.cli.main`."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="effkern")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if os.environ.get("EFFKERN_TRACEBACK") == "1":
            raise
        print(f"effkern: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def one_line(error: Exception) -> str:
    """What went wrong in one line, with the exception's name where the text says too little."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError | ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
