"""Processes that form one process group (gloo) and run one check after another together."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

#: Seconds that a check may take before it counts as hanging.
_PATIENCE = 100.0
_MODULES = ("checkpoint", "fsdp", "norms", "refused", "rounding", "steps")


class Processes:
    """A process group of ``count`` processes.

    They come from a server that has imported torch and the tests once, and stay until `close`.
    """

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"tests.distributed.test_{m}" for m in _MODULES])
        with tempfile.NamedTemporaryFile(delete=False) as store:
            self._store = store.name
        os.unlink(self._store)
        self._processes = []
        self._ends: list[Connection] = []
        for rank in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, count, self._store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(mine)

    def run(self, check: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of a test module on every process.

        Returns:
            What it returned on each.

        Raises:
            AssertionError: if it failed on one, with the traceback there; or took too long.
        """
        for end in self._ends:
            end.send((check, args))
        results, failed = [], []
        for rank, end in enumerate(self._ends):
            if not end.poll(5.0 if failed else _PATIENCE):
                failed.append(f"process {rank} hangs")
                continue
            problem, result = end.recv()
            results.append(result)
            if problem:
                failed.append(f"process {rank}:\n{problem}")
        if any("hangs" in one for one in failed):
            self.close()
        assert not failed, "\n".join(failed)
        return results

    @property
    def usable(self) -> bool:
        """Whether nothing has hung."""
        return bool(self._ends)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._ends = []
        if os.path.exists(self._store):
            os.unlink(self._store)


def _serve(rank: int, count: int, store: str, end: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    while True:
        try:
            check, args = end.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            end.send(("", check(*args)))
        except BaseException:
            end.send((traceback.format_exc(), None))
