"""What the compilers make of every GPU kernel, on a machine that needs no GPU.

Compiles the CUDA sources of a checkout for each architecture, reads registers, spills and memory
from the assembler's report and the accesses to memory from the instructions, adds what Triton's
compiler says of its kernels, and prints one table::

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

import effkern

__all__ = [
    "ARCHITECTURES",
    "Row",
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
        spill_bytes: stack that a thread has for spilled registers.
        local_bytes: local memory that a thread has.
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
    if not _sources():
        return "the CUDA sources are not here: run it in a checkout"
    if shutil.which("nvcc") is None:
        return "no nvcc on PATH"
    if _tool("nvdisasm") is None:
        return "no nvdisasm on PATH, and no Triton that would bring one"
    return ""


def cuda_rows(architectures: Sequence[int] = ARCHITECTURES) -> list[Row]:
    """Every instance of every CUDA kernel on every architecture; takes a minute.

    Raises:
        RuntimeError: if a tool is missing (`why_no_cuda`), or fails.
    """
    if reason := why_no_cuda():
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max_workers=2) as pool:
        work = [(source, arch, Path(scratch)) for arch in architectures for source in _sources()]
        rows = [row for some in pool.map(lambda task: _compile(*task), work) for row in some]
    return sorted(rows, key=lambda row: (row.kernel, row.arch))


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


def _sources() -> list[Path]:
    return sorted((_checkout() / "csrc" / "cuda").glob("*.cu"))


def _checkout() -> Path:
    return Path(effkern.__file__).resolve().parents[1]


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or as Triton's package carries it."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which(name, path=str(Path(triton.origin).parent / "backends/nvidia/bin"))


def _compile(source: Path, arch: int, folder: Path) -> list[Row]:
    cubin = folder / f"{source.stem}_{arch}.cubin"
    options = ["-cubin", "-O3", "-std=c++20", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    include = ["-I", str(_checkout() / "csrc")]
    report = _run(["nvcc", *options, *include, str(source), "-o", str(cubin)])
    instructions = _instructions(_run([str(_tool("nvdisasm")), "-c", str(cubin)]))
    usages = _usages(report)
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


def _usages(report: str) -> dict[str, dict[str, int]]:
    """The assembler's report, by symbol."""
    usages = {}
    entries = re.split(r"Compiling entry function '(\w+)' for '\w+'", report)[1:]
    for symbol, text in zip(entries[::2], entries[1::2], strict=True):
        stack, spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", text)[0]

        def number(pattern: str, text: str = text) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        usages[symbol] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_bytes": int(spilled),
            "local_bytes": int(stack) + number(r"(\d+) bytes lmem"),
            "shared_bytes": number(r"(\d+) bytes smem"),
        }
    return usages


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


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
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
