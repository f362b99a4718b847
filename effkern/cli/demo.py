"""``effkern demo``: the main job, and what it needs to be judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from effkern.cli.options import Device, Json, Seed, open_device

#: `effkern.bench.demo.train.STATE_DTYPES`, which is loaded when the demo runs.
StateDtype = Literal["bfloat16", "int8"]


def demo(
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", help="Train on this file, not on the source of Python's standard library."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", help="At most so many steps of each side.", min=1)
    ] = 80,
    seconds: Annotated[
        float,
        typer.Option("--seconds", help="Begin no step after so many seconds of training.", min=0),
    ] = 80.0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Windows of text in a step.", min=1)
    ] = 8,
    state_dtype: Annotated[
        StateDtype | None,
        typer.Option(
            "--state-dtype",
            help="Of effkern's optimizer states; by default float32, as stock.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for demo.png and result.json.", file_okay=False)
    ] = Path("effkern-demo"),
) -> None:
    """Train one small GPT twice on real text, stock PyTorch beside effkern, and show both.

    Both start from the same weights and see the same batches in turn.
    Stock is torch.nn.RMSNorm with torch.optim.AdamW(fused=True);
    effkern is that model with its norms and its optimizer exchanged.
    Fails when the losses at the end differ by more than 1 %.
    """
    from effkern.bench.demo import report, train
    from effkern.bench.results import write_json
    from effkern.cli.console import console, progress

    open_device(device)
    settings = train.DemoSettings(
        device=device,
        seed=seed,
        text=text,
        steps=steps,
        seconds=seconds,
        batch_size=batch_size,
        state_dtype=state_dtype,
    )
    out.mkdir(parents=True, exist_ok=True)
    with progress() as tell:
        training = train.train(settings, tell)
    summary = report.summarise(training)
    screen = console()
    screen.print(report.render(training, summary))

    data = report.as_data(training, summary)
    write_json(out / "result.json", data)
    if json is not None:
        write_json(json, data)
    report.draw(training, summary, out / "demo.png")
    screen.print(
        f"Written: {out / 'demo.png'}, {out / 'result.json'}", highlight=False, markup=False
    )
    if not summary.losses_agree:
        raise RuntimeError(
            f"the losses at the end differ by {summary.loss_difference:.2%}, "
            f"more than {report.LOSS_TOLERANCE:.0%}"
        )
