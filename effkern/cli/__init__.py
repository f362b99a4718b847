"""The command ``effkern``.

The commands' own modules are imported when a command runs.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``effkern`` with these arguments, by default the process's; returns the exit status.

    0 on success, 2 on bad arguments, 1 with one line on stderr on any other failure. The
    environment variable ``EFFKERN_TRACEBACK=1`` lets such a failure through with its traceback, for
    bug reports.
    """
    from effkern.cli.app import run

    return run(arguments)
