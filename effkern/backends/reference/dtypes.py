"""Which dtype a storage dtype is computed in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values stored as ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
