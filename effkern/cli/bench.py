"""``effkern bench``: microbenchmarks beside the strongest peers."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effkern.cli.options import Device, Json, Seed, open_device, output_file

if TYPE_CHECKING:
    from effkern.bench.results import Result

app = typer.Typer(help="Microbenchmarks beside the strongest peers.", no_args_is_help=True)


class DType(str, enum.Enum):
    """The dtypes that a benchmark runs in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class TensorSet(str, enum.Enum):
    """The sets of tensors of ``bench adam`` and ``bench optimizers``."""

    gpt2 = "gpt2"
    small = "small"


class OptimizerCase(str, enum.Enum):
    """The cases of ``bench optimizers``."""

    adamw = "adamw"
    sgd = "sgd"
    adagrad = "adagrad"
    rmsprop = "rmsprop"
    adadelta = "adadelta"
    lion = "lion"
    lamb = "lamb"
    int8 = "int8"
    clip = "clip"


def _plot_file(file: Path | None) -> Path | None:
    if file is not None and file.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{file} does not end in .png, .svg or .pdf")
    return output_file(file)


Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="Draw the times here (.png, .svg, .pdf).",
        callback=_plot_file,
        dir_okay=False,
    ),
]
Rounds = Annotated[int, typer.Option("--rounds", help="Timed rounds for each case.", min=1)]
Dtype = Annotated[DType, typer.Option("--dtype", help="Of all tensors.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="CPU threads; by default as many as PyTorch takes.", min=1),
]


@app.command("adam")
def adam(
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
    tensors: Annotated[
        list[TensorSet] | None,
        typer.Option(
            "--tensors", help="gpt2: GPT-2 small's 148; small: 2,500 small ones. By default both."
        ),
    ] = None,
    dtype: Dtype = DType.float32,
    rounds: Rounds = 20,
    threads: Threads = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", help="torch.compile of torch's step too; takes minutes."
        ),
    ] = False,
) -> None:
    """One AdamW step over many tensors, beside torch, DeepSpeed and Apex."""
    from effkern.bench import adam as bench

    settings = bench.AdamSettings(
        device=str(_prepare(device, threads)),
        tensors=tuple(chosen.value for chosen in tensors or TensorSet),
        dtype=dtype.value,
        rounds=rounds,
        compile=compile,
        seed=seed,
    )
    _measure(bench.run, settings, json, plot)


@app.command("optimizers")
def optimizers(
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
    cases: Annotated[
        list[OptimizerCase] | None,
        typer.Option(
            "--cases",
            help="A rule; int8: AdamW with 8-bit states; clip: AdamW with gradients clipped by "
            "their norm. May be given several times; by default all.",
        ),
    ] = None,
    tensors: Annotated[
        list[TensorSet] | None,
        typer.Option(
            "--tensors", help="gpt2: GPT-2 small's 148, the default; small: 2,500 small ones."
        ),
    ] = None,
    dtype: Dtype = DType.float32,
    rounds: Rounds = 20,
    threads: Threads = None,
) -> None:
    """One step of each optimizer over many tensors, beside torch's class of the same name."""
    from effkern.bench import optimizers as bench

    settings = bench.OptimizersSettings(
        device=str(_prepare(device, threads)),
        cases=tuple(chosen.value for chosen in cases or OptimizerCase),
        tensors=tuple(chosen.value for chosen in tensors or (TensorSet.gpt2,)),
        dtype=dtype.value,
        rounds=rounds,
        seed=seed,
    )
    _measure(bench.run, settings, json, plot)


@app.command("norms", help="RMSNorm, LayerNorm and CRMSNorm, forward and backward.")
@app.command("rms_norm", help="RMSNorm, forward and backward.")
@app.command("layer_norm", help="LayerNorm, forward and backward.")
@app.command("crms_norm", help="CRMSNorm, forward and backward.")
def norms(
    context: typer.Context,
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", help="Rows of every input; by default 8192 of 768, fewer longer ones.", min=1
        ),
    ] = None,
    hidden_size: Annotated[
        list[int] | None,
        typer.Option(
            "--hidden-size",
            help="Features of a row, by default 768; may be given several times.",
            min=1,
        ),
    ] = None,
    dtype: Dtype = DType.float32,
    rounds: Rounds = 15,
    threads: Threads = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile of the formula too.")
    ] = True,
    fresh: Annotated[
        bool,
        typer.Option("--fresh/--no-fresh", help="Also where a call finds no memory freed before."),
    ] = True,
    overhead: Annotated[
        bool, typer.Option("--overhead/--no-overhead", help="What a call on a tiny input costs.")
    ] = True,
) -> None:
    """Of the norm that the command is named after, or of all three."""
    from effkern.bench import norms as bench

    named = context.info_name
    settings = bench.NormsSettings(
        device=str(_prepare(device, threads)),
        norms=(named,) if named in bench.NORMS else tuple(bench.NORMS),
        rows=rows,
        hidden_sizes=tuple(hidden_size or (768,)),
        dtype=dtype.value,
        rounds=rounds,
        compile=compile,
        fresh=fresh,
        overhead=overhead,
        seed=seed,
    )
    _measure(bench.run, settings, json, plot)


@app.command("norm_softmax")
def norm_softmax(
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
    batch: Annotated[
        int, typer.Option("--batch", help="Matrices of the softmax's input; 0: no softmax.", min=0)
    ] = 96,
    rows: Annotated[int, typer.Option("--rows", help="Of each matrix.", min=1)] = 512,
    columns: Annotated[int, typer.Option("--columns", help="Of each matrix.", min=1)] = 512,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Rows of the logits; 0: no cross-entropy.", min=0)
    ] = 4096,
    classes: Annotated[int, typer.Option("--classes", help="Of the logits.", min=1)] = 50257,
    dtype: Dtype = DType.float32,
    rounds: Rounds = 11,
    threads: Threads = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile of the formula too.")
    ] = True,
) -> None:
    """NormSoftmax and its cross-entropy, beside torch's softmax and the plain formula."""
    from effkern.bench import norm_softmax as bench

    settings = bench.NormSoftmaxSettings(
        device=str(_prepare(device, threads)),
        shape=(batch, rows, columns) if batch else (),
        tokens=tokens,
        classes=classes,
        dtype=dtype.value,
        rounds=rounds,
        compile=compile,
        seed=seed,
    )
    _measure(bench.run, settings, json, plot)


def _prepare(device: str, threads: int | None) -> object:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return open_device(device)


def _measure(
    run: Callable[..., Result], settings: object, json: Path | None, plot: Path | None
) -> None:
    from effkern.bench import plots, tables
    from effkern.cli.console import console, progress

    with progress() as report:
        result = run(settings, report)
    console().print(tables.render(result))
    if json is not None:
        result.write(json)
    if plot is not None:
        plots.draw(result, plot)
