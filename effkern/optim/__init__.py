"""Optimizers that stand in for those of `torch.optim`."""

from effkern.optim.adam import FusedAdam, FusedAdamW

__all__ = ["FusedAdam", "FusedAdamW"]
