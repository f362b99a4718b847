"""``effkern.swap_norms``: the norms of a model become the fused ones, in place."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from effkern.nn.norm import CRMSNorm, LayerNorm, RMSNorm
from effkern.nn.recognised import HOW, NotRecognised, Recognised, recognise, twin_class
from effkern.nn.swap_report import Left, Report, Swapped
from effkern.ops._declare import DTYPES

__all__ = ["SwapReport", "swap_norms"]


@dataclass
class SwapReport(Report[type[nn.Module]]):
    """What `swap_norms` did: which modules have another class since, and which have not."""

    noun = "norms"

    def undo(self) -> None:
        """Give every module its class back; a second call does nothing.

        Raises:
            RuntimeError: if a module has become something else since; the others are given back.
        """
        changed = []
        for norm in self.swapped:
            if type(norm.module) is norm.now:
                vars(norm.module).pop(HOW, None)
                norm.module.__class__ = norm.was
            elif type(norm.module) is not norm.was:
                changed.append(norm.path)
        if changed:
            raise RuntimeError(f"undo: these are no longer what was swapped in: {changed}")


def swap_norms(model: nn.Module) -> SwapReport:
    """Exchange the norms of ``model`` for effkern's fused ones, in place.

    A module stays the same object, with the same parameters, buffers, hooks and names in the
    state_dict; its class changes. That is: `torch.nn.RMSNorm` and `torch.nn.LayerNorm`, and classes
    of other libraries that normalise the last dimension, as the models of transformers bring them.
    Those are recognised by what they compute from random numbers in float32 and bfloat16, and keep
    their way of rounding. In float64 theirs compute in float32; the fused ones do not.

    Args:
        model: any module; a norm itself too.

    Returns:
        What was swapped, what was not and why; its ``undo()`` takes it back.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_norms: model must be a torch.nn.Module, got {type(model).__name__}")
    report = SwapReport()
    known: dict[object, Recognised | str] = {}
    for path, module in model.named_modules():
        kind = type(module)
        if kind in (RMSNorm, LayerNorm, CRMSNorm) or HOW in vars(module):
            continue
        found = _why_not(module) or _recognised(module, known)
        if isinstance(found, str):
            if _is_called_norm(module):
                report.left.append(Left(path, kind, found))
            continue
        if isinstance(found, Recognised):
            twin = twin_class(kind, found.form.centred, found.eps)
            object.__setattr__(module, HOW, found)
        else:
            twin = found
        module.__class__ = twin
        report.swapped.append(Swapped(path, module, kind, twin))
    return report


#: PyTorch's classes; effkern's are their subclasses, with the same attributes.
_TORCH = {nn.RMSNorm: RMSNorm, nn.LayerNorm: LayerNorm}


def _why_not(module: nn.Module) -> str:
    """What forbids any exchange; empty if nothing does."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it was compiled in place"
    if any(parameter.dtype not in DTYPES for parameter in module.parameters(recurse=False)):
        return "its parameters are of a dtype that the kernels do not take"
    if any(map(is_lazy, module.parameters(recurse=False))):
        return "its parameters have no shape yet"
    return ""


def _recognised(
    module: nn.Module, known: dict[object, Recognised | str]
) -> Recognised | type[nn.Module] | str:
    """How the module normalises, the class to give it, or why it stays as it is.

    Args:
        module: which.
        known: what was found out before, for modules of the same class and attributes.
    """
    if (twin := _TORCH.get(type(module))) is not None:
        return twin
    key = _key(module)
    if key not in known:
        try:
            # Numbers are compared, which those of a FakeTensorMode, say, have not.
            with _disable_current_modes():
                known[key] = recognise(module)
        except NotRecognised as reason:
            known[key] = str(reason)
    return known[key]


def _key(module: nn.Module) -> object:
    """What decides how a module without children computes."""
    plain = (bool, int, float, str, tuple, torch.dtype, type(None))
    attributes = tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "training"
    )
    shapes = tuple((name, p.shape, p.dtype) for name, p in module.named_parameters(recurse=False))
    other = any(
        not isinstance(value, plain) and name not in _EVERY_MODULES
        for name, value in vars(module).items()
    )
    alone = other or module._modules or module._buffers
    # With something that cannot be compared, a module is like itself alone.
    return type(module), repr(attributes), shapes, id(module) if alone else None


#: Attributes that a module has from `nn.Module`; those that count are looked at by themselves.
_EVERY_MODULES = vars(nn.Module())


def _is_called_norm(module: nn.Module) -> bool:
    """Whether a user would expect it among the swapped ones."""
    if isinstance(module, nn.RMSNorm | nn.LayerNorm):
        return True
    named = re.search(r"(layer|rms)_?norm", type(module).__name__, re.IGNORECASE)
    return named is not None and next(module.children(), None) is None
