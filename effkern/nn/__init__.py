"""Layers that stand in for those of `torch.nn`."""

from effkern.nn import functional
from effkern.nn.norm import RMSNorm

__all__ = ["RMSNorm", "functional"]
