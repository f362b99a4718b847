"""Does NormSoftmax in the attention of a small GPT steady or speed up its training?

python benchmarks/norm_softmax_training.py [--steps 150] [--seeds 5] [--rates 1e-3 4e-3 1.6e-2]

The same model, data and seeds twice: as PyTorch has it, and after ``effkern.swap_softmax``. It
predicts bytes of the standard library's source, the demo's text. Loss is cross-entropy in nats a
byte on text that was held out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from torch import Tensor, nn

import effkern
from effkern.bench import machine
from effkern.bench.demo.text import batch, corpus
from effkern.bench.results import write_json

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 64, 4, 2, 16
EVERY = 25  # steps between evaluations


class SmallGPT(nn.Module):
    """Embeddings, Pre-LN layers of PyTorch's own, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, text: Tensor) -> Tensor:
        """The logits of the next byte, for text of shape (N, CONTEXT)."""
        x = self.tokens(text) + self.places.weight
        return self.head(self.norm(self.layers(x, mask=self.mask, is_causal=True)))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean cross-entropy of windows of shape (N, CONTEXT + 1)."""
    logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train(norm_softmax: bool, seed: int, rate: float, steps: int, texts: Any) -> list[float]:
    """The losses on held-out text, at the start and after each EVERY steps."""
    torch.manual_seed(seed)
    model = SmallGPT()
    if norm_softmax:
        assert len(effkern.swap_softmax(model).swapped) == LAYERS
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    held_out = batch(texts[1], torch.Generator().manual_seed(0), size=64, context=CONTEXT)
    curve = []
    for step in range(steps + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                curve.append(loss_of(model.eval(), held_out).item())
            model.train()
        loss = loss_of(model, batch(texts[0], generator, size=BATCH, context=CONTEXT))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve


def steps_to(curve: list[float], goal: float) -> int | None:
    """The first evaluated step whose loss is at most ``goal``."""
    return next((i * EVERY for i, loss in enumerate(curve) if loss <= goal), None)


def summarise(curves: dict[str, list[list[float]]]) -> dict[str, Any]:
    """For one learning rate: final losses with their spread, and steps to softmax's own end."""
    goal = statistics.mean(curve[-1] for curve in curves["softmax"])
    found: dict[str, Any] = {"goal": goal}
    for name, runs in curves.items():
        ends = [curve[-1] for curve in runs]
        needed = [steps_to(curve, goal) for curve in runs]
        found[name] = {
            "final_mean": statistics.mean(ends),
            "final_deviation": statistics.stdev(ends) if len(ends) > 1 else 0.0,
            "final_worst": max(ends),
            "steps_to_goal": needed,
        }
    return found


def draw(results: dict[str, dict[str, list[list[float]]]], file: Path) -> None:
    """A panel for each learning rate: means, and bands from the best to the worst seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 3.2), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, (rate, curves) in zip(panels, results.items(), strict=True):
        for name, runs in curves.items():
            steps = [i * EVERY for i in range(len(runs[0]))]
            columns = list(zip(*runs, strict=True))
            panel.plot(steps, [statistics.mean(c) for c in columns], label=name)
            panel.fill_between(steps, list(map(min, columns)), list(map(max, columns)), alpha=0.25)
        panel.set(title=f"learning rate {rate}", xlabel="step", yscale="log")
    panels[0].set_ylabel("held-out loss, nats a byte")
    panels[0].legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Train, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3, 1.6e-2])
    parser.add_argument("--output", type=Path, default=RESULTS / "norm_softmax_training")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is no faster with more
    texts = corpus(None, CONTEXT)
    results: dict[str, dict[str, list[list[float]]]] = {}
    summaries = {}
    began = time.perf_counter()
    for rate in options.rates:
        curves: dict[str, list[list[float]]] = {"softmax": [], "NormSoftmax": []}
        for seed in range(options.seeds):
            for name, runs in curves.items():
                runs.append(train(name == "NormSoftmax", seed, rate, options.steps, texts))
        results[f"{rate:g}"] = curves
        summaries[f"{rate:g}"] = summarise(curves)
        for name in curves:
            of_name = summaries[f"{rate:g}"][name]
            print(
                f"learning rate {rate:g}, {name}: final loss {of_name['final_mean']:.3f} +- "
                f"{of_name['final_deviation']:.3f}, worst {of_name['final_worst']:.3f}, steps to "
                f"{summaries[f'{rate:g}']['goal']:.3f}: {of_name['steps_to_goal']}",
                flush=True,
            )
    print(f"{time.perf_counter() - began:.0f} s")
    data = {
        "machine": machine.describe(),
        "model": {"context": CONTEXT, "width": WIDTH, "heads": HEADS, "layers": LAYERS},
        "training": {"batch": BATCH, "steps": options.steps, "seeds": options.seeds},
        "evaluated_every": EVERY,
        "summaries": summaries,
        "curves": results,
    }
    write_json(options.output.with_suffix(".json"), data)
    draw(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
