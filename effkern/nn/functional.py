"""The layers as functions, with the signatures of `torch.nn.functional`."""

from effkern.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
