"""``effkern doctor``: what this machine has, what serves each op, what to do about the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from effkern.cli.options import Json, Seed, device_name

if TYPE_CHECKING:
    from rich.console import RenderableType


def doctor(
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="cpu, cuda or cuda:N; by default all there are.", callback=device_name
        ),
    ] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Show what this machine has, which backend serves each op, and what is missing.

    Runs every backend that is there once, on small random tensors, and fails when a result is
    wrong.
    """
    from effkern.bench.results import write_json
    from effkern.cli.console import console
    from effkern.cli.options import open_device

    if device is not None:
        open_device(device)
    findings = examine(device, seed)
    console().print(render(findings))
    if json is not None:
        write_json(json, findings)
    wrong = [
        f"{c['backend']} on {c['device']}: {c['error']}" for c in findings["checks"] if c["error"]
    ]
    if wrong:
        raise RuntimeError("; ".join(wrong))


def examine(device: str | None, seed: int) -> dict[str, Any]:
    """Everything that the doctor tells, as plain data; about one device, or about all there are."""
    import dataclasses

    import torch

    import effkern
    from effkern.backends import build_info, native
    from effkern.bench import machine, self_check

    statuses = effkern.backends()
    has_gpu = torch.cuda.is_available()
    devices = [device] if device is not None else ["cpu", "cuda"] if has_gpu else ["cpu"]
    return {
        "machine": machine.describe()
        | {
            "compiler": machine.program("c++", "g++", "clang++"),
            "nvcc": machine.program("nvcc"),
            "library_folder": str(native.library_folder()),
            "build": build_info.describe(native.library_folder()),
        },
        "backends": {name: dataclasses.asdict(status) for name, status in statuses.items()},
        "served_by": {"cpu": _server("cpu"), "cuda": _server("cuda") if has_gpu else None},
        "checks": [
            {"backend": name, "device": on, "error": self_check.check(name, on, seed=seed)}
            for on in devices
            for name, status in statuses.items()
            if status.available and on.partition(":")[0] in status.devices
        ],
    }


def _server(kind: str) -> str:
    """The backend that serves tensors on this kind of device, or why the one asked for cannot."""
    from effkern.backends.choice import serving

    try:
        return serving(kind)
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"


def render(findings: dict[str, Any]) -> RenderableType:
    """The findings as tables, and a line for each thing that is missing."""
    from rich.console import Group

    return Group(
        _machine_table(findings["machine"]),
        _served_table(findings["backends"], findings["served_by"]),
        _backends_table(findings["backends"], findings["checks"]),
    )


def _table(title: str, *columns: str, header: bool = True) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=header)
    for column in columns:
        table.add_column(column)
    return table


def _machine_table(machine: dict[str, Any]) -> RenderableType:
    table = _table("This machine", "", "", header=False)
    cuda = machine["torch_cuda"]
    rows = {
        "system": machine["system"],
        "CPU": f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads",
        "ISA in use": machine["cpu_isa"] or "none: effkern's CPU library is not loaded",
        "GPU": ", ".join(machine["gpus"]) or "none that PyTorch can use",
        "Python": machine["python"],
        "PyTorch": f"{machine['torch']}, "
        + (f"built for CUDA {cuda}" if cuda else "built without CUDA"),
        "Triton": machine["triton"] or "not installed",
        "C++ compiler": machine["compiler"] or "none on the path",
        "nvcc": machine["nvcc"] or "none on the path",
        "effkern": f"{machine['effkern']}, libraries in {machine['library_folder']}",
        "build": "\n".join(machine["build"]),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _served_table(
    backends: dict[str, dict[str, Any]], served_by: dict[str, str | None]
) -> RenderableType:
    table = _table("Which backend serves what", "op", "CPU tensors", "CUDA tensors")

    def server(op: str, name: str | None) -> str:
        if name is None:
            return "no GPU here"
        return "reference" if name in backends and op not in backends[name]["ops"] else name

    for op in sorted({op for status in backends.values() for op in status["ops"]}):
        table.add_row(op, server(op, served_by["cpu"]), server(op, served_by["cuda"]))
    return table


def _backends_table(
    backends: dict[str, dict[str, Any]], checks: list[dict[str, str]]
) -> RenderableType:
    table = _table("Backends", "backend", "there", "checked now", "why not, and what to do")
    for name, status in backends.items():
        results = [
            f"{c['device']}: {c['error'] or 'right'}" for c in checks if c["backend"] == name
        ]
        advice = (
            ""
            if status["available"]
            else ". ".join(t for t in (status["reason"], status["remedy"]) if t)
        )
        table.add_row(name, "yes" if status["available"] else "no", "\n".join(results), advice)
    return table
