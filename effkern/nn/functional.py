"""The layers as functions, with the signatures of `torch.nn.functional`."""

from effkern.ops.crms_norm import crms_norm
from effkern.ops.layer_norm import layer_norm
from effkern.ops.rms_norm import rms_norm

__all__ = ["crms_norm", "layer_norm", "rms_norm"]
