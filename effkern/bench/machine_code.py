"""What the compilers make of every GPU kernel, on a machine that needs no GPU.

Reads registers, stack and memory of the CUDA kernels, and their accesses to memory, from the
machine code in the library that was built, adds what Triton's compiler says of its kernels, and
prints one table::

    python -m effkern.bench.machine_code --json machine_code.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from effkern.backends import native

__all__ = [
    "ARCHITECTURES",
    "Row",
    "cubin_rows",
    "cuda_rows",
    "main",
    "triton_rows",
    "why_no_cuda",
    "why_no_triton",
]

ARCHITECTURES = (80, 90, 100)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel on one architecture.

    Attributes:
        kernel: which, with the template arguments or the dtype that set it apart.
        arch: compute capability times ten: 90 for sm_90.
        registers: of a thread.
        spill_bytes: stack of a thread, where registers are spilled to.
        local_bytes: local memory of a thread, with that.
        shared_bytes: shared memory that the compiler laid out; what a launch adds is not in it.
        vector_loads: whether there are loads of 16 bytes from global memory.
        vector_stores: the same for stores.
    """

    kernel: str
    arch: int
    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    vector_loads: bool
    vector_stores: bool


def why_no_cuda() -> str:
    """Why `cuda_rows` cannot be had here; empty where it can."""
    if not native.library_path("CUDA").exists():
        return "the CUDA library was not built"
    for tool in ("cuobjdump", "nvdisasm"):
        if _tool(tool) is None:
            return f"no {tool} on PATH, and no Triton that would bring one"
    return ""


def cuda_rows(architectures: Sequence[int] = ARCHITECTURES) -> list[Row]:
    """Every instance of every CUDA kernel on every architecture.

    Raises:
        RuntimeError: if something is missing (`why_no_cuda`), a tool fails, or the library has no
            machine code for one of them.
    """
    if reason := why_no_cuda():
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max_workers=2) as pool:
        library = native.library_path("CUDA").resolve()
        _run([str(_tool("cuobjdump")), "-xelf", "all", str(library)], Path(scratch))
        work = []
        for arch in architectures:
            found = sorted(Path(scratch).glob(f"*.sm_{arch}.cubin"))
            if not found:
                raise RuntimeError(f"{library.name} was not built for sm_{arch}")
            work += [(cubin, arch) for cubin in found]
        rows = [row for some in pool.map(lambda task: cubin_rows(*task), work) for row in some]
    return sorted(rows, key=lambda row: (row.kernel, row.arch))


def cubin_rows(cubin: Path, arch: int) -> list[Row]:
    """Every kernel in a file of machine code for one architecture."""
    instructions = _instructions(_run([str(_tool("nvdisasm")), "-c", str(cubin)]))
    usages = _usages(_run([str(_tool("cuobjdump")), "-res-usage", str(cubin)]), arch)
    names = _readable(usages)
    return [
        Row(
            kernel=f"cuda {names[symbol]}",
            arch=arch,
            **usage,
            vector_loads=re.search(r"\bLDG\.[\w.]*128", instructions[symbol]) is not None,
            vector_stores=re.search(r"\bSTG\.[\w.]*128", instructions[symbol]) is not None,
        )
        for symbol, usage in usages.items()
    ]


def why_no_triton() -> str:
    """Why `triton_rows` cannot be had here; empty where it can."""
    from effkern.backends import choice

    if not choice.has_triton():
        return "Triton is not installed"
    return "Triton's interpreter is on" if choice.triton_interprets() else ""


def triton_rows(architectures: Sequence[int] = ARCHITECTURES) -> list[Row]:
    """Every Triton kernel of the main paths on every architecture.

    Raises:
        RuntimeError: if Triton is missing or interprets (`why_no_triton`).
    """
    if reason := why_no_triton():
        raise RuntimeError(reason)
    from effkern.backends.triton import machine_code

    return [Row(**row) for row in machine_code.rows(architectures)]


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or as Triton's package carries it."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which(name, path=str(Path(triton.origin).parent / "backends/nvidia/bin"))


def _usages(report: str, arch: int) -> dict[str, dict[str, int]]:
    """What each kernel takes, by symbol."""
    reserved = 1024 if arch >= 90 else 0  # of a block's shared memory, by the system
    entries = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report
    )
    return {
        symbol: {
            "registers": int(registers),
            "spill_bytes": int(stack),
            "local_bytes": int(stack) + int(local),
            "shared_bytes": int(shared) - reserved,
        }
        for symbol, registers, stack, shared, local in entries
    }


def _instructions(assembly: str) -> dict[str, str]:
    """The instructions of each kernel, by symbol."""
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", assembly, flags=re.MULTILINE)[1:]
    return dict(zip(sections[::2], sections[1::2], strict=True))


def _readable(symbols: Iterable[str]) -> dict[str, str]:
    """``kernel<Rule, 0, float>`` for each mangled name, without namespaces; the name itself where
    there is no c++filt.
    """
    symbols = list(symbols)
    tool = _tool("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return {symbol: symbol for symbol in symbols}
    lines = _run([tool, *symbols]).replace("effkern::", "").splitlines()
    found = (re.search(r"(\w+<[^<>(]*>)\(", line) for line in lines)
    return {s: name[1] if name else s for s, name in zip(symbols, found, strict=True)}


def _run(command: list[str], folder: Path | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m effkern.bench.machine_code")
    parser.description = "Registers, spills, memory and 16-byte accesses of every GPU kernel."
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="for example 80 90 100"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(arguments)

    rows, left_out = [], []
    for name, reason, collect in (
        ("cuda", why_no_cuda(), cuda_rows),
        ("triton", why_no_triton(), triton_rows),
    ):
        if reason:
            left_out.append(f"left out: {name}: {reason}")
        else:
            rows += collect(options.arch)
    _print(rows, left_out)
    if options.json is not None:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


def _print(rows: list[Row], notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for field in dataclasses.fields(Row):
        table.add_column(
            field.name.replace("_", " "), justify="left" if field.name == "kernel" else "right"
        )
    for row in rows:
        cells = dataclasses.astuple(row)
        table.add_row(*("yes" if c is True else "no" if c is False else str(c) for c in cells))
    # Wide enough for the names, also where the output is a file.
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    for note in notes:
        console.print(note)


if __name__ == "__main__":
    main()
