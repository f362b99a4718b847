"""The two changes that a user makes to a training script."""

from __future__ import annotations

from torch import nn

import effkern


def swap_norms(model: nn.Module) -> int:
    """Replace every ``torch.nn.RMSNorm`` in ``model`` by effkern's, sharing the weights.

    Returns:
        How many were replaced.
    """
    swapped = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.RMSNorm:
                setattr(parent, name, _twin(child))
                swapped += 1
    return swapped


def _twin(norm: nn.RMSNorm) -> nn.Module:
    twin = effkern.nn.RMSNorm(
        norm.normalized_shape, eps=norm.eps, elementwise_affine=norm.elementwise_affine
    )
    twin.weight = norm.weight
    return twin.train(norm.training)
