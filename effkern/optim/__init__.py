"""Optimizers that stand in for those of `torch.optim`."""

from effkern.optim.adadelta import FusedAdadelta
from effkern.optim.adagrad import FusedAdagrad
from effkern.optim.adam import FusedAdam, FusedAdamW
from effkern.optim.clip import clip_grad_norm_
from effkern.optim.lamb import FusedLAMB
from effkern.optim.lion import FusedLion
from effkern.optim.rmsprop import FusedRMSprop
from effkern.optim.sgd import FusedSGD

__all__ = [
    "FusedAdadelta",
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedLAMB",
    "FusedLion",
    "FusedRMSprop",
    "FusedSGD",
    "clip_grad_norm_",
]
