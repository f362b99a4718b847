"""Fused kernels for PyTorch, and methods that make training and inference cheaper.

optimizer = effkern.FusedAdamW(model.parameters(), lr=3e-4)     # for torch.optim.AdamW
norm = effkern.nn.RMSNorm(768)                                  # for torch.nn.RMSNorm
"""

from typing import TYPE_CHECKING, Any

from effkern import nn
from effkern.backends.choice import BackendStatus, backends, use_backend
from effkern.nn.swap import swap_norms
from effkern.nn.swap_softmax import swap_softmax
from effkern.optim import (
    FusedAdadelta,
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedLAMB,
    FusedLion,
    FusedRMSprop,
    FusedSGD,
    clip_grad_norm_,
)
from effkern.version import __version__

if TYPE_CHECKING:
    from effkern import convert

__all__ = [
    "BackendStatus",
    "FusedAdadelta",
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedLAMB",
    "FusedLion",
    "FusedRMSprop",
    "FusedSGD",
    "__version__",
    "backends",
    "clip_grad_norm_",
    "convert",
    "nn",
    "swap_norms",
    "swap_softmax",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Parts that are imported when they are first used."""
    if name == "convert":
        import importlib

        return importlib.import_module("effkern.convert")
    raise AttributeError(f"module 'effkern' has no attribute {name!r}")
