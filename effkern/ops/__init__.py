"""The ops of effkern, ``torch.ops.effkern.*``: one file per family, in front of every backend."""

from effkern.backends import native
from effkern.ops import (
    _declare,
    crms_norm,
    layer_norm,
    norm_attention,
    norm_softmax,
    norm_softmax_cross_entropy,
    plan,
    rms_norm,
    step,
    watch,
)

native.load()
_declare.fill_gaps()
plan.fill_gap()

__all__ = [
    "crms_norm",
    "layer_norm",
    "norm_attention",
    "norm_softmax",
    "norm_softmax_cross_entropy",
    "plan",
    "rms_norm",
    "step",
    "watch",
]
