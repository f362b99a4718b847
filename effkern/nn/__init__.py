"""Layers that stand in for those of `torch.nn`."""

from effkern.nn import functional
from effkern.nn.norm import CRMSNorm, LayerNorm, RMSNorm
from effkern.nn.norm_attention import NormSoftmaxAttention
from effkern.nn.norm_softmax import NormSoftmax, NormSoftmaxCrossEntropyLoss

__all__ = [
    "CRMSNorm",
    "LayerNorm",
    "NormSoftmax",
    "NormSoftmaxAttention",
    "NormSoftmaxCrossEntropyLoss",
    "RMSNorm",
    "functional",
]
