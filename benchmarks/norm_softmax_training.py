"""Does NormSoftmax in the attention of a small transformer steady or speed up its training?

python benchmarks/norm_softmax_training.py [text | digits] [--steps 600] [--seeds 5]
    [--rates 1e-3 4e-3 1.6e-2] [--workers 1]

The same model, data and seeds twice: as PyTorch has it, and after ``effkern.swap_softmax``.
``text``: a GPT predicts bytes of the standard library's source, the demo's text. ``digits``: a
vision transformer reads scikit-learn's 1,797 digits of 8 x 8 pixels in patches of 2 x 2. Loss is
cross-entropy in nats on data that was held out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS
from torch import Tensor, nn

import effkern
from effkern.bench import machine
from effkern.bench.demo.text import batch, corpus
from effkern.bench.results import write_json

WIDTH, HEADS, LAYERS = 64, 4, 4
CONTEXT, BATCH = 64, 16  # of the text: bytes, and windows a step
PATCH, IMAGES = 2, 64  # of the digits: pixels, and images a step
EVALUATIONS = 25  # after the first, evenly over the steps


class Task(NamedTuple):
    """Something to learn: a model, and the loss of a training step and of the data held out."""

    make: Callable[[], nn.Module]
    step_loss: Callable[[nn.Module, torch.Generator], Tensor]
    held_out_loss: Callable[[nn.Module], Tensor]


def transformer() -> nn.TransformerEncoder:
    """Pre-LN layers of PyTorch's own."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


class SmallGPT(nn.Module):
    """Bytes of shape (N, CONTEXT) to the logits of the byte after each."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers, self.head = transformer(), nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, text: Tensor) -> Tensor:
        """Every layer under the causal mask."""
        x = self.tokens(text) + self.places.weight
        return self.head(self.layers(x, mask=self.mask, is_causal=True))


class SmallViT(nn.Module):
    """Images of shape (N, 8, 8) to the logits of their digit."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.places = nn.Embedding((8 // PATCH) ** 2, WIDTH)
        self.layers, self.head = transformer(), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The mean over the patches, after the layers, decides."""
        x = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        return self.head(self.layers(self.patches(x) + self.places.weight).mean(1))


def text() -> Task:
    """The next byte of Python."""
    train, held_out = corpus(None, CONTEXT)
    fixed = batch(held_out, torch.Generator().manual_seed(0), size=64, context=CONTEXT)

    def loss(model: nn.Module, windows: Tensor) -> Tensor:
        logits = model(windows[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def step_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        return loss(model, batch(train, generator, size=BATCH, context=CONTEXT))

    return Task(SmallGPT, step_loss, lambda model: loss(model, fixed))


def digits() -> Task:
    """What digit an image shows; a fifth of the images is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 8 - 1
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]

    def loss(model: nn.Module, chosen: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(images[chosen]), labels[chosen])

    def step_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        return loss(model, train[torch.randint(len(train), (IMAGES,), generator=generator)])

    return Task(SmallViT, step_loss, lambda model: loss(model, held_out))


TASKS = {"text": text, "digits": digits}


def train(name: str, norm_softmax: bool, seed: int, rate: float, steps: int) -> list[float]:
    """The losses on held-out data, at the start and at each of EVALUATIONS later moments."""
    torch.set_num_threads(1)  # so small a model is no faster with more
    task = TASKS[name]()
    torch.manual_seed(seed)
    model = task.make()
    if norm_softmax:
        assert len(effkern.swap_softmax(model).swapped) == LAYERS
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for step in range(steps + 1):
        if step % (steps // EVALUATIONS) == 0:
            with torch.no_grad():
                curve.append(task.held_out_loss(model.eval()).item())
            model.train()
        loss = task.step_loss(model, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve


def summarise(curves: dict[str, list[list[float]]], every: int) -> dict[str, Any]:
    """For one learning rate: least losses with their spread, and steps to softmax's own least."""
    goal = statistics.mean(min(curve) for curve in curves["softmax"])
    found: dict[str, Any] = {"goal": goal}
    for name, runs in curves.items():
        least, ends = [min(curve) for curve in runs], [curve[-1] for curve in runs]
        found[name] = {
            "least_mean": statistics.mean(least),
            "least_deviation": statistics.stdev(least) if len(least) > 1 else 0.0,
            "final_mean": statistics.mean(ends),
            "final_worst": max(ends),
            "steps_to_goal": [
                next((i * every for i, loss in enumerate(curve) if loss <= goal), None)
                for curve in runs
            ],
        }
    return found


def draw(results: dict[str, dict[str, list[list[float]]]], every: int, file: Path) -> None:
    """A panel for each learning rate: means, and bands from the best to the worst seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 3.2), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, (rate, curves) in zip(panels, results.items(), strict=True):
        for name, runs in curves.items():
            steps = [i * every for i in range(len(runs[0]))]
            columns = list(zip(*runs, strict=True))
            panel.plot(steps, [statistics.mean(c) for c in columns], label=name)
            panel.fill_between(steps, list(map(min, columns)), list(map(max, columns)), alpha=0.25)
        panel.set(title=f"learning rate {rate}", xlabel="step", yscale="log")
    panels[0].set_ylabel("held-out loss, nats")
    panels[0].legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Train, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", nargs="?", choices=TASKS, default="text")
    parser.add_argument("--steps", type=int, default=600, help=f"a multiple of {EVALUATIONS}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3, 1.6e-2])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--output", type=Path, help="the files' path, without .json and .png")
    options = parser.parse_args()
    output = options.output or RESULTS / f"norm_softmax_training_{options.task}"
    every = options.steps // EVALUATIONS
    began = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        runs = {
            (rate, name, seed): pool.submit(
                train, options.task, name == "NormSoftmax", seed, rate, options.steps
            )
            for rate in options.rates
            for name in ("softmax", "NormSoftmax")
            for seed in range(options.seeds)
        }
        curves = {key: run.result() for key, run in runs.items()}
    results: dict[str, dict[str, list[list[float]]]] = {}
    for (rate, name, _), curve in curves.items():
        results.setdefault(f"{rate:g}", {}).setdefault(name, []).append(curve)
    summaries = {rate: summarise(of_rate, every) for rate, of_rate in results.items()}
    for rate, summary in summaries.items():
        for name in ("softmax", "NormSoftmax"):
            print(rate, name, summary[name], flush=True)
    contents = {
        "machine": machine.describe(),
        "task": options.task,
        "steps": options.steps,
        "seconds": time.perf_counter() - began,
        "summaries": summaries,
        "curves": results,
    }
    write_json(output.with_suffix(".json"), contents)
    draw(results, every, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
