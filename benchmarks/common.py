"""What the scripts share: each writes its figures, with the machine they are of, into results/."""

import sys
from pathlib import Path

from effkern.cli import main
from effkern.cli.console import console

__all__ = ["RESULTS", "console", "run", "run_as"]

RESULTS = Path(__file__).resolve().parent / "results"


def run(benchmark: str) -> None:
    """Run ``effkern bench BENCHMARK`` with this script's arguments, and keep the result."""
    sys.exit(run_as(benchmark, benchmark, sys.argv[1:]))


def run_as(benchmark: str, name: str, arguments: list[str]) -> int:
    """Run ``effkern bench BENCHMARK``, and keep the result under a name; the exit status."""
    kept = ["--json", f"{RESULTS / name}.json", "--plot", f"{RESULTS / name}.png"]
    return main(["bench", benchmark, *kept, *arguments])
