"""Layers that stand in for those of `torch.nn`."""

from effkern.nn import functional
from effkern.nn.norm import CRMSNorm, LayerNorm, RMSNorm

__all__ = ["CRMSNorm", "LayerNorm", "RMSNorm", "functional"]
