"""Which backend runs an op: what can serve, what cannot and why, and how a caller chooses.

By default CPU tensors go to ``cpu`` and CUDA tensors to ``cuda``; where a library is missing, CUDA
tensors go to ``triton`` and what is left goes to ``reference``. `use_backend` and the environment
variable ``EFFKERN_BACKEND`` choose one by name.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType

import torch

from effkern.backends import native

__all__ = ["BackendStatus", "backends", "serving", "use_backend"]


@dataclass(frozen=True)
class BackendStatus:
    """What `backends` says of one backend.

    Attributes:
        name: "reference", "cpu", "cuda" or "triton".
        available: whether it can run here.
        reason: why it cannot; empty where it can.
        remedy: what to do about it; empty where nothing is to be done.
        devices: types of device whose tensors it takes here.
        ops: names of the public ops it implements.
    """

    name: str
    available: bool
    reason: str
    remedy: str
    devices: tuple[str, ...]
    ops: tuple[str, ...]


#: The families that have all four backends; attention has two.
_OPS = (
    "adam",
    "rms_norm",
    "crms_norm",
    "layer_norm",
    "norm_softmax",
    "norm_softmax_cross_entropy",
)
_OPS_OF = {name: (*_OPS, "norm_softmax_attention") for name in ("reference", "cpu")}


def triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


# Looked for once: Dynamo does not trace the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether Triton is installed (it is not imported to find out)."""
    return _HAS_TRITON


def backends() -> dict[str, BackendStatus]:
    """What each backend can do here, by name: reference, cpu, cuda, triton."""
    gpu = torch.cuda.is_available()
    rebuild = (
        "reinstall effkern with a C++ compiler on the machine; EFFKERN_BUILD=cpu says what fails"
    )
    cuda_reason, cuda_remedy = (
        native.why_not("CUDA"),
        "reinstall effkern where nvcc (CUDA 12.4 or newer) is found",
    )
    if torch.version.cuda is None:
        cuda_remedy = "install a CUDA build of PyTorch"
    if not cuda_reason and not gpu:
        cuda_reason, cuda_remedy = (
            "PyTorch sees no CUDA device",
            "run on a machine with an NVIDIA GPU and its driver",
        )
    triton_reason = triton_remedy = ""
    if not has_triton():
        triton_reason, triton_remedy = "Triton is not installed", "install the triton package"
    elif not gpu and not triton_interprets():
        triton_reason = "PyTorch sees no GPU, and Triton's interpreter is off"
        triton_remedy = (
            "run on a machine with a GPU, or set TRITON_INTERPRET=1 to try the kernels on the CPU"
        )
    every_device = ("cpu", "cuda") if gpu else ("cpu",)
    triton_devices = ("cuda",) if gpu else ("cpu",)

    def status(name: str, reason: str, remedy: str, devices: tuple[str, ...]) -> BackendStatus:
        ops = _OPS_OF.get(name, _OPS)
        return BackendStatus(
            name, not reason, reason, remedy if reason else "", () if reason else devices, ops
        )

    return {
        "reference": status("reference", "", "", every_device),
        "cpu": status("cpu", native.why_not("CPU"), rebuild, ("cpu",)),
        "cuda": status("cuda", cuda_reason, cuda_remedy, ("cuda",)),
        "triton": status("triton", triton_reason, triton_remedy, triton_devices),
    }


_choice: ContextVar[str | None] = ContextVar(
    "effkern_backend", default=os.environ.get("EFFKERN_BACKEND") or None
)

# Dynamo reads (and guards on) a ContextVar from PyTorch 2.14 on. Before, a compiled function sees
# the choice through this attribute, which the last `use_backend` of any thread has set.
_DYNAMO_READS_CONTEXT = torch.__version__ >= "2.14"


class _Mirror:
    choice: str | None = _choice.get()


def _requested_where_dynamo_reads_no_context() -> str | None:
    return _Mirror.choice if torch.compiler.is_compiling() else _choice.get()


#: Gives the backend that the caller asked for by name, or None.
requested: Callable[[], str | None] = (
    _choice.get if _DYNAMO_READS_CONTEXT else _requested_where_dynamo_reads_no_context
)


def default_backend(device: str) -> str:
    """The backend of tensors on device type ``device`` where nobody asks for another."""
    if device == "cpu":
        return "cpu" if native.serves("CPU") else "reference"
    if device == "cuda" and (native.serves("CUDA") or has_triton()):
        return "cuda" if native.serves("CUDA") else "triton"
    return "reference"


def serving(device: str) -> str:
    """The backend that runs ops on tensors of device type ``device`` for the current caller.

    Raises:
        ValueError: if the one that was asked for by name does not exist.
        RuntimeError: if it cannot run here, or does not take such tensors.
    """
    choice = requested()
    if choice is None:
        return default_backend(device)
    status = check_available(choice)
    if status is not None and device not in status.devices:
        raise RuntimeError(
            f"effkern backend {choice!r} takes {' or '.join(status.devices)} tensors here, "
            f"got a tensor on {device}"
        )
    return choice


class use_backend:
    """Run every effkern op inside the ``with`` block on one backend.

    Holds for the current thread or task alone. A compiled function is compiled anew for each
    choice.

    Args:
        name: "reference", "cpu", "cuda" or "triton"; None for the default choice.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if it cannot run here; the message says why and what to do. From an op inside
            the block: if the backend does not take tensors of that device.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            check_available(name)
        self._name = name
        self._tokens: list[Token[str | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_choice.set(self._name))
        _Mirror.choice = self._name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choice.reset(self._tokens.pop())
        _Mirror.choice = _choice.get()


def check_available(name: str) -> BackendStatus | None:
    """The status of backend ``name`` (None for one that a test brought along).

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if it cannot run here.
    """
    if name in test_backends:
        return None
    known = backends()
    if name not in known:
        raise ValueError(f"unknown effkern backend {name!r}: choose one of {', '.join(known)}")
    status = known[name]
    if not status.available:
        raise RuntimeError(
            f"effkern backend {name!r} cannot run here: {status.reason}; {status.remedy}"
        )
    return status


#: Names of overloads that a test defined beside the four backends (tests/simt).
test_backends: set[str] = set()
