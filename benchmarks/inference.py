"""What does inference cost after the conversion, beside the stock model and one without norms?

python benchmarks/inference.py [NAME ...]   measures; results/inference_NAME.json
python benchmarks/inference.py --table      prints the table of docs/convert.md
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import RESULTS, console

import effkern
from effkern.bench import machine, tables
from effkern.bench.progress import counter
from effkern.bench.results import OURS, Case, Result, make_rows
from effkern.bench.timers import Contestant, WallClock, alternate
from effkern.cli.console import progress
from effkern.convert.runtime import BiasedRMSNorm

#: Copies of each model that are timed one after another: where its weights come to lie in memory
#: can make a model some percent faster or slower, with norms or without.
COPIES = 6

#: Seconds that the rounds of one case may take, all copies together.
SECONDS = 24.0
MOST_ROUNDS, FEWEST_ROUNDS = 101, 4

#: The copy whose norms are gone: what a norm that costs nothing would give.
BOUND = "no norms"

#: Ends the name of a case of all the model's norms and nothing else.
ALONE = ", the norms alone"


def vit(name: str) -> torch.nn.Module:
    import timm

    return timm.create_model(f"vit_{name}_patch16_224", pretrained=False)


def gpt2() -> torch.nn.Module:
    import transformers

    config = transformers.GPT2Config(use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 224, 224)


def tokens(batch: int) -> torch.Tensor:
    return torch.randint(50257, (batch, 128))


Make = Callable[[], torch.nn.Module]
MODELS: dict[str, tuple[str, Make, Callable[[int], torch.Tensor]]] = {
    "vit_ti": ("ViT-Ti/16", lambda: vit("tiny"), images),
    "vit_s": ("ViT-S/16", lambda: vit("small"), images),
    "gpt2": ("GPT-2 small, 128 tokens", gpt2, tokens),
}
BATCHES = (1, 4)


def without_norms(model: torch.nn.Module) -> torch.nn.Module:
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.LayerNorm):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, torch.nn.Identity())
    return model


def calls_of_norms(model: torch.nn.Module, x: torch.Tensor) -> Callable[[object], None]:
    """All norms of a model, one after another, on inputs of the shapes that they get."""
    calls: list[tuple[torch.nn.Module, torch.Tensor]] = []

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        calls.append((module, torch.randn_like(args[0])))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm | BiasedRMSNorm)
    ]
    model(x)
    for hook in hooks:
        hook.remove()

    def run(_: object) -> None:
        for module, tensor in calls:
            module(tensor)

    return run


@torch.no_grad()
def measure(name: str) -> Result:
    title, make, inputs = MODELS[name]
    torch.manual_seed(0)
    original = make().eval()
    bare = without_norms(copy.deepcopy(original))
    converted = copy.deepcopy(original)
    report = effkern.convert.to_rmsnorm(converted, (inputs(1),)).report
    originals = {OURS: converted, "stock": original, BOUND: bare}
    times: dict[str, dict[str, list[float]]] = {}
    for number in range(COPIES):
        models = {key: copy.deepcopy(model) for key, model in originals.items()}
        for batch in BATCHES:
            x = inputs(batch)
            case = f"{title}, batch {batch}"
            if number == 0:
                times[case] = {key: [] for key in models}
                times[f"{case}{ALONE}"] = {key: [] for key in models if key != BOUND}
            of_models = {key: partial(call, model, x) for key, model in models.items()}
            add(times[case], of_models, case, SECONDS / COPIES)
            alone = {key: calls_of_norms(models[key], x) for key in models if key != BOUND}
            add(times[f"{case}{ALONE}"], alone, case, SECONDS / COPIES / 8)
    cases = [Case(case, make_rows(taken), of_overhead=True) for case, taken in times.items()]
    settings = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "copies": COPIES,
    }
    notes = [f"{len(report.swapped)} norms converted, {len(report.left)} left"]
    return Result("inference", settings, machine.describe(), cases, notes=notes)


def call(model: torch.nn.Module, x: torch.Tensor, _: object) -> object:
    return model(x)


def add(
    times: dict[str, list[float]],
    functions: dict[str, Callable[[object], object]],
    case: str,
    seconds: float,
) -> None:
    """Append the times of as many rounds as take some seconds."""
    contestants = {key: Contestant(function) for key, function in functions.items()}
    clock = WallClock()
    alternate(contestants, rounds=1, clock=clock, warm_up=0)
    start = clock.mark()
    alternate(contestants, rounds=1, clock=clock, warm_up=0)
    once = clock.seconds(start, clock.mark())
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / once)))
    with progress() as show:
        on_round = counter(show, case, rounds)
        found = alternate(contestants, rounds=rounds, clock=clock, warm_up=0, on_round=on_round)
    for key, taken in found.items():
        times[key] += taken


def print_table() -> None:
    print(
        "| model | stock | converted / stock | converted / no norms | its norms alone / stock's |"
    )
    print("|---|---|---|---|---|")
    for name in MODELS:
        file = RESULTS / f"inference_{name}.json"
        cases = json.loads(file.read_text())["cases"] if file.exists() else []
        by_name = {
            case["name"]: {row["name"]: row["speedup"] for row in case["rows"]} for case in cases
        }
        for case in cases:
            whole = by_name[case["name"]]
            if BOUND not in whole:
                continue
            (stock,) = [row["seconds"] for row in case["rows"] if row["name"] == "stock"]
            alone = by_name.get(f"{case['name']}{ALONE}", {})
            spreads = whole["stock"], whole[BOUND], alone.get("stock")
            ratios = [as_ratio(spread) if spread else "-" for spread in spreads]
            print(f"| {case['name']} | {tables.duration(stock['median'])} | {' | '.join(ratios)} |")


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
