"""Which architectures convert, what stays of their layer norms, and how far outputs then differ.

python benchmarks/convert.py [--to crmsnorm] [NAME ...]   prints a table of docs/convert.md
and, of all architectures, writes results/convert.json or results/convert_crmsnorm.json
"""

import argparse
import json
from typing import Any

import torch
from architectures import ARCHITECTURES, OUTPUTS
from common import RESULTS

import effkern
from effkern.convert import NotConvertible
from effkern.convert.flatten import named_tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", choices=("rmsnorm", "crmsnorm"), default="rmsnorm")
    parser.add_argument("names", nargs="*", help="parts of names; by default all")
    chosen = parser.parse_args()
    rows = []
    wanted = {name: (name, None) for name in ARCHITECTURES} | OUTPUTS
    for label, (name, outputs) in wanted.items():
        if not chosen.names or any(part in label for part in chosen.names):
            rows.append({"architecture": label} | tried(name, outputs, chosen.to))
            print(as_row(rows[-1]), flush=True)
    if not chosen.names:
        file = "convert.json" if chosen.to == "rmsnorm" else "convert_crmsnorm.json"
        (RESULTS / file).write_text(json.dumps(rows, indent=1) + "\n")


def tried(name: str, outputs: list[str] | None, kind: str) -> dict[str, Any]:
    try:
        model, inputs = ARCHITECTURES[name]()
    except ImportError as error:
        return {"result": f"not tried: {error}"}
    randomise(model)
    before = run(model, inputs)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    convert = getattr(effkern.convert, f"to_{kind}")
    try:
        report = convert(model, inputs, outputs=outputs).report
    except NotConvertible as error:
        same = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        return {"result": f"refused: {error}" if same else "refused, but not left as it was"}
    after = run(model, inputs)
    row = {
        "result": "converted",
        "swapped": len(report.swapped),
        "left": len(report.left),
        "recentred": len(report.recentred),
        "float64": max(check.difference for check in report.checks),
        "float32": max(relative(before[name], after[name]) for name in report.outputs),
    }
    if kind == "crmsnorm":
        row["folded"] = sum("folded" in swapped.how for swapped in report.swapped)
    return row


def randomise(model: torch.nn.Module) -> None:
    """Random affines and biases, and weights with a mean, so that equality means something."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.add_(0.02 * noise + 0.01)
            else:
                parameter.copy_(0.3 * noise + (0 if "bias" in name else 1))


def run(model: torch.nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        torch.manual_seed(0)
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return {name: tensor.clone() for name, tensor in named_tensors(result)}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.is_floating_point() or a.numel() == 0:
        return 0.0
    return ((a - b).abs().max() / a.abs().max().clamp(min=1)).item()


def as_row(row: dict[str, Any]) -> str:
    if row["result"] != "converted":
        return f"| {row['architecture']} | {row['result']} | | | | |"
    folded = f", {row['folded']} folded" if "folded" in row else ""
    return (
        f"| {row['architecture']} | converted | {row['swapped']} of {row['swapped'] + row['left']}"
        f"{folded} | {row['recentred']} | {row['float64']:.0e} | {row['float32']:.0e} |"
    )


if __name__ == "__main__":
    main()
