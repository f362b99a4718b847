"""What the build left beside the libraries: which were built, how, and why one was not.

CMake (or setup.py, where it builds nothing) writes ``build_info.json`` into the library folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["describe", "read", "why_not_built"]


def read(folder: Path) -> dict[str, Any]:
    """The build information in ``folder``; empty where no build has run.

    Keys: ``version``, ``system``, ``torch_headers`` (the version whose headers were used) and
    ``torch_oldest`` (the oldest version that the libraries run under); ``cpu`` and ``cuda``, each
    with ``built`` and, where that is false, ``reason``. Where it is true: ``compiler``, and
    ``flags`` and ``instruction_sets`` (name to flags) for the CPU, ``architectures`` for CUDA.
    """
    try:
        return dict(json.loads((folder / "build_info.json").read_text()))
    except FileNotFoundError:
        return {}


def why_not_built(folder: Path, library: str) -> str:
    """Why ``library`` ("cpu" or "cuda") was not built into ``folder``; empty where it was."""
    info = read(folder)
    if not info:
        return "no build has run in this checkout; `pip install .` or `make build` runs one"
    return "" if info[library]["built"] else str(info[library]["reason"])


def describe(folder: Path) -> list[str]:
    """One line per library, for people."""
    info = read(folder)
    lines = []
    for library, title in (("cpu", "CPU library"), ("cuda", "CUDA library")):
        reason = why_not_built(folder, library)
        if reason:
            lines.append(f"{title}: not built: {reason}")
            continue
        what = info[library].get("instruction_sets", info[library].get("architectures"))
        lines.append(f"{title}: built by {info[library]['compiler']} for {', '.join(what)}")
    return lines
