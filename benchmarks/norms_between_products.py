"""What does a call of a norm cost where a network makes it: after products, whose numbers have
driven Python and the kernels' code out of the caches?

python benchmarks/norms_between_products.py [--rounds 1000]   results/norms_between_products.json
"""

from __future__ import annotations

import argparse

import torch
from common import RESULTS, console
from torch import Tensor, nn

import effkern.nn
from effkern.bench import machine, tables
from effkern.bench.results import OURS, Case, Result, make_rows
from effkern.bench.timers import Contestant, WallClock, alternate

#: Rows and features of vision transformers' streams.
SHAPES = ((197, 192), (197, 384))


def block(features: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
    )


@torch.no_grad()
def measure(rows: int, features: int, rounds: int) -> list[Case]:
    mlp, stream = block(features), torch.randn(1, rows, features)
    layers: dict[str, dict[str, nn.Module]] = {
        "RMSNorm": {
            OURS: effkern.nn.RMSNorm(features, eps=1e-6),
            "nn.LayerNorm": nn.LayerNorm(features),
            "nn.RMSNorm": nn.RMSNorm(features, eps=1e-6),
        },
        "LayerNorm": {
            OURS: effkern.nn.LayerNorm(features),
            "nn.LayerNorm": nn.LayerNorm(features),
        },
    }

    def after_products() -> Tensor:
        return stream + mlp(stream)

    cases = []
    for name, of_name in layers.items():
        contestants = {key: Contestant(layer, after_products) for key, layer in of_name.items()}
        times = alternate(contestants, rounds=rounds, clock=WallClock())
        cases.append(Case(f"{name}, {rows} x {features}", make_rows(times), of_overhead=True))
    return cases


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    found = [case for shape in SHAPES for case in measure(*shape, rounds)]
    settings = {"device": "cpu", "threads": torch.get_num_threads(), "dtype": "float32"}
    result = Result("norms_between_products", settings, machine.describe(), found)
    console().print(tables.render(result))
    result.write(RESULTS / "norms_between_products.json")
