"""What does inference cost after the conversion, beside the stock model and one without norms?

python benchmarks/inference.py [NAME ...]   measures; results/inference_NAME.json
python benchmarks/inference.py --table      prints the table of docs/convert.md
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, console

import effkern
from effkern.bench import machine, tables
from effkern.bench.progress import counter
from effkern.bench.results import OURS, Case, Result, make_rows
from effkern.bench.timers import Contestant, WallClock, alternate
from effkern.cli.console import progress

#: Seconds that the rounds of one case may take.
SECONDS = 15.0
MOST_ROUNDS, FEWEST_ROUNDS = 101, 9

#: The copy whose norms are gone: what a norm that costs nothing would give.
BOUND = "no norms"


def vit(name: str) -> torch.nn.Module:
    import timm

    return timm.create_model(f"vit_{name}_patch16_224", pretrained=False)


def gpt2() -> torch.nn.Module:
    import transformers

    config = transformers.GPT2Config(use_cache=False, return_dict=False)
    return transformers.GPT2LMHeadModel(config)


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 224, 224)


def tokens(batch: int) -> torch.Tensor:
    return torch.randint(50257, (batch, 128))


Make = Callable[[], torch.nn.Module]
MODELS: dict[str, tuple[str, Make, Callable[[int], torch.Tensor], tuple[int, ...]]] = {
    "vit_ti": ("ViT-Ti/16", lambda: vit("tiny"), images, (1, 8, 32)),
    "vit_s": ("ViT-S/16", lambda: vit("small"), images, (1, 8)),
    "gpt2": ("GPT-2 small, 128 tokens", gpt2, tokens, (1, 4)),
}


def without_norms(model: torch.nn.Module) -> torch.nn.Module:
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.LayerNorm):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, torch.nn.Identity())
    return model


@torch.no_grad()
def measure(name: str) -> Result:
    title, make, inputs, batches = MODELS[name]
    torch.manual_seed(0)
    stock = make().eval()
    bound = without_norms(copy.deepcopy(stock))
    converted = copy.deepcopy(stock)
    report = effkern.convert.to_rmsnorm(converted, (inputs(2),)).report
    models = {OURS: converted, "stock": stock, BOUND: bound}
    cases = []
    for batch in batches:
        x = inputs(batch)
        contestants = {
            key: Contestant(lambda _, model=model, x=x: model(x)) for key, model in models.items()
        }
        clock = WallClock()
        start = clock.mark()
        alternate(contestants, rounds=1, clock=clock, warm_up=0)
        once = clock.seconds(start, clock.mark())
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / once)))
        with progress() as show:
            times = alternate(
                contestants,
                rounds=rounds,
                clock=clock,
                on_round=counter(show, f"{title}, batch {batch}", rounds + 2),
            )
        cases.append(Case(f"{title}, batch {batch}", make_rows(times), of_overhead=True))
    settings = {"device": "cpu", "threads": torch.get_num_threads(), "dtype": "float32"}
    notes = [f"{len(report.swapped)} norms converted, {len(report.left)} left"]
    return Result("inference", settings, machine.describe(), cases, notes=notes)


def print_table() -> None:
    print("| model | time of the stock model | converted / stock | converted / no norms |")
    print("|---|---|---|---|")
    for name in MODELS:
        for case in json.loads((RESULTS / f"inference_{name}.json").read_text())["cases"]:
            rows = {row["name"]: row for row in case["rows"]}
            stock = tables.duration(rows["stock"]["seconds"]["median"])
            ratios = [as_ratio(rows[key]["speedup"]) for key in ("stock", BOUND)]
            print(f"| {case['name']} | {stock} | {' | '.join(ratios)} |")


def as_ratio(speedup: dict[str, Any]) -> str:
    """Effkern's time over the other's; quartiles change places when a ratio is turned over."""
    low, high = 1 / speedup["high"], 1 / speedup["low"]
    return f"{1 / speedup['median']:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print_table()
    else:
        for model in sys.argv[1:] or MODELS:
            result = measure(model)
            console().print(tables.render(result))
            result.write(RESULTS / f"inference_{model}.json")
