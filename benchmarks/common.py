"""What the scripts share: each writes its figures, with the machine they are of, into results/."""

import sys
from pathlib import Path

from effkern.cli import main
from effkern.cli.console import console

__all__ = ["RESULTS", "console", "run"]

RESULTS = Path(__file__).resolve().parent / "results"


def run(benchmark: str) -> None:
    """Run ``effkern bench BENCHMARK`` with this script's arguments, and keep the result."""
    kept = ["--json", f"{RESULTS / benchmark}.json", "--plot", f"{RESULTS / benchmark}.png"]
    sys.exit(main(["bench", benchmark, *kept, *sys.argv[1:]]))
