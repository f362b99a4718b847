"""The peak memory of one training step, for one model alone though two are in the process."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from effkern.bench.demo.model import ByteGPT


def peak_memory(
    model: ByteGPT, optimizer: torch.optim.Optimizer, tokens: Tensor
) -> tuple[int, int]:
    """The bytes of parameters and state, and the most that a step takes, those included.

    Makes one more step. The optimizer must have made one before, so that its state exists.
    """
    optimizer.zero_grad()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    tensors = [*model.parameters(), *(value for value in state if isinstance(value, Tensor))]
    resident = sum(tensor.nbytes for tensor in tensors if tensor.device == tokens.device)

    def step() -> None:
        model.loss(tokens).backward()
        optimizer.step()

    return resident, resident + peak_of(step, tokens.device)


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors on ``device`` that ``work`` has at a time, beside those before."""
    return _peak_on_gpu(work, device) if device.type == "cuda" else _peak_on_cpu(work)


def _peak_on_gpu(work: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(work: Callable[[], object]) -> int:
    """The peak of what PyTorch's CPU allocator gave out, as its profiler saw it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it tells stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    allocated = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak
