"""The layers as functions, with the signatures of `torch.nn.functional`."""

from effkern.ops.crms_norm import crms_norm
from effkern.ops.layer_norm import layer_norm
from effkern.ops.norm_attention import norm_softmax_attention
from effkern.ops.norm_softmax import norm_softmax
from effkern.ops.norm_softmax_cross_entropy import norm_softmax_cross_entropy
from effkern.ops.rms_norm import rms_norm

__all__ = [
    "crms_norm",
    "layer_norm",
    "norm_softmax",
    "norm_softmax_attention",
    "norm_softmax_cross_entropy",
    "rms_norm",
]
