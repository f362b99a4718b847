"""``effkern convert``: a checkpoint folder to its converted twin."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effkern.cli.options import Device, Json, Seed, open_device

if TYPE_CHECKING:
    from torch import Tensor


class Kind(str, enum.Enum):
    """What a model can be converted to."""

    rmsnorm = "rmsnorm"
    crmsnorm = "crmsnorm"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="Checkpoint folder of transformers.", exists=True, file_okay=False
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; must be empty.", file_okay=False)
    ],
    to: Annotated[Kind, typer.Option("--to", help="What its norms become.")] = Kind.rmsnorm,
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            help="Example inputs by argument name (.safetensors); by default random ones.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option("--output", help="An output that must stay equal; by default all."),
    ] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Convert a Pre-LN checkpoint to its equal Pre-RMSNorm or Pre-CRMSNorm twin, with a proof.

    Reads and writes folders of transformers; asks no network.
    Fails, and writes nothing, when equality cannot be proved.
    effkern.convert.load(OUT) loads the result.
    """
    from effkern.cli.console import console, progress
    from effkern.convert import checkpoint, to_crmsnorm, to_rmsnorm

    if out.resolve() == source.resolve():
        raise typer.BadParameter("OUT must not be IN")
    if out.exists() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty")
    where = open_device(device)
    with progress() as report:
        report("load", 0, 3)
        model = checkpoint.load_model(source).to(where)
        example = _read(inputs) if inputs else checkpoint.example_inputs(model, seed)
        example = {name: value.to(where) for name, value in example.items()}
        report("convert", 1, 3)
        conversion = (to_crmsnorm if to is Kind.crmsnorm else to_rmsnorm)(
            model, example, outputs=outputs or None
        )
        report("save", 2, 3)
        checkpoint.save(conversion, out)
        report("done", 3, 3)
    console().print(str(conversion.report), highlight=False, markup=False, soft_wrap=True)
    if json is not None:
        json.write_text(conversion.report.to_json() + "\n")


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = load_file(file)
    return tensors
