"""What every conversion does: trace, change, compare before and after, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effkern.convert import check, structure, weights
from effkern.convert.norms import with_inline_norms
from effkern.convert.plan import Plan
from effkern.convert.report import (
    Check,
    ConversionReport,
    Edit,
    Left,
    NotConvertible,
    Recentred,
)
from effkern.convert.structure import Step
from effkern.convert.trace import Trace, trace

__all__ = ["Changes", "Conversion", "make", "prove", "report_of", "start"]


_INLINE = "a layer norm is spelled out among the module's other operations, and stays"

#: Parts of a model that a report names.
_MOST_NAMED = 5


@dataclass
class Conversion:
    """A converted model and what was done to it.

    Attributes:
        model: the model that was given.
        report: see `ConversionReport`.
        steps: the changes to modules, as data that JSON can hold.
    """

    model: nn.Module
    report: ConversionReport
    steps: list[Step]


@dataclass
class Changes:
    """What is to change: modules, and parameters.

    Attributes:
        steps: the changes to modules.
        values: gives the new values of parameters by name, from the values of all of them.
    """

    steps: list[Step]
    values: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def start(
    function: str,
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    outputs: Sequence[str] | None,
) -> tuple[Trace, list[str]]:
    """Check a conversion's arguments; trace the model, and name the outputs that must stay equal.

    Raises:
        NotConvertible: if the model cannot be traced.
        TypeError, ValueError: if an argument of the function of this name is not what it must be.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a module, got {type(model).__name__}")
    if not isinstance(example_inputs, tuple | dict):
        raise TypeError(
            f"{function}: example_inputs must be a tuple or a dict, "
            f"got {type(example_inputs).__name__}"
        )
    _refuse_out_of_reach(model)
    traced = trace(model, example_inputs)
    return traced, _chosen(function, list(traced.outputs), outputs)


def _refuse_out_of_reach(model: nn.Module) -> None:
    """Refuse modules that cannot be changed, and tensors without values."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NotConvertible(path, "it is TorchScript: convert the model before it is compiled")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                raise NotConvertible(path, f"{name} is on the meta device and has no values yet")


def _chosen(function: str, names: list[str], outputs: Sequence[str] | None) -> list[str]:
    """The outputs that must stay equal, by their full names."""
    if outputs is None:
        return names
    if isinstance(outputs, str):
        raise TypeError(f"{function}: outputs must be a sequence of names, got a string")
    chosen: list[str] = []
    for wanted in map(str, outputs):
        found = [name for name in names if name == wanted or name.startswith(f"{wanted}.")]
        if not found:
            raise ValueError(
                f"{function}: outputs names {wanted!r}, but the model returns {', '.join(names)}"
            )
        chosen += found
    return chosen


def prove(
    model: nn.Module,
    inputs: check.Inputs,
    traced: Trace,
    changes: Changes,
    names: list[str],
) -> list[Check]:
    """Compare before and after in float64, or in the model's dtype where it cannot run in that.

    Leaves the model as it was.
    """
    try:
        with weights.in_float64(model), check.computing_in_float64():
            check.outputs_of(model, inputs, wide=True)
    except Exception:  # whatever stops it, the model's own dtype is left to try
        return _compared_in_own_dtype(model, inputs, traced, changes, names)
    with weights.in_float64(model) as twins, check.computing_in_float64():
        return _compared(model, inputs, traced, changes, names, torch.float64, twins)


def _compared_in_own_dtype(
    model: nn.Module,
    inputs: check.Inputs,
    traced: Trace,
    changes: Changes,
    names: list[str],
) -> list[Check]:
    with torch.no_grad():
        edited = changes.values(traced.tensors)
    kept = {name: traced.tensors[name].detach().clone() for name in edited}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        return _compared(model, inputs, traced, changes, names, dtype, traced.tensors)
    finally:
        for name, value in kept.items():
            traced.tensors[name].data.copy_(value)


def _compared(
    model: nn.Module,
    inputs: check.Inputs,
    traced: Trace,
    changes: Changes,
    names: list[str],
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
) -> list[Check]:
    """Compare outputs on several inputs, before and after ``tensors``, the model's own at present,
    and its modules are edited. Takes the modules' changes back.
    """  # fmt: skip
    wide = dtype == torch.float64
    pairs: list[tuple[check.Sample, dict[str, Tensor]]] = []
    for sample in check.samples(inputs):
        try:
            pairs.append((sample, check.outputs_of(model, sample.inputs, wide=wide)))
        except Exception:  # the model does not take inputs of this kind
            if not pairs:
                raise
    for name, value in changes.values(tensors).items():
        tensors[name].data.copy_(value)
    take_back = structure.apply(model, changes.steps)
    try:
        checks = []
        for sample, before in pairs:
            try:
                after = check.outputs_of(model, sample.inputs, wide=wide)
            except Exception as error:
                reason = f"once converted, it fails on {sample.what}: {error}"
                raise NotConvertible("", reason) from error
            checks.append(check.compare(sample, before, after, names, dtype))
        return checks
    finally:
        take_back()


def make(model: nn.Module, traced: Trace, changes: Changes) -> None:
    """Change a model for good."""
    with torch.no_grad():
        new = changes.values(traced.tensors)
        structure.apply(model, changes.steps)
        for name, value in new.items():
            traced.tensors[name].copy_(value)


def report_of(
    kind: str, traced: Trace, plan: Plan, names: list[str], checks: list[Check], dropout: str | None
) -> ConversionReport:
    """What a plan does, the swapped norms left out.

    Args:
        kind: of the conversion.
        traced: the model.
        plan: what was changed.
        names: of the outputs that stay equal.
        checks: of them.
        dropout: what it does in training mode; None where there is none.
    """
    report = ConversionReport(
        kind=kind,
        features=sorted({group.features for group in plan.converted}),
        left=[Left(path, reason) for path, reason in plan.left.items()]
        + [Left(path, _INLINE) for path in with_inline_norms(traced)],
        outputs=names,
        checks=checks,
    )
    for node, key in plan.edits.items():
        scale = None if key.scale is None else traced.parameters[key.scale]
        report.edits.append(Edit(traced.parameters[node], key.axis.dim, key.features, scale))
    for site, key in plan.sites.items():
        dim = key.axis.dim - key.node.meta["val"].dim()
        report.recentred.append(Recentred(site.module, str(site), dim, plan.serves[site]))
    report.not_covered = _not_covered(traced, names, checks, dropout)
    return report


def _not_covered(
    traced: Trace, names: list[str], checks: list[Check], dropout: str | None
) -> list[str]:
    texts = [
        "what the example inputs do not reach: other arguments and flags, and sizes other than "
        "those checked",
    ]
    texts.append("training mode" + (f": {dropout}" if dropout else ""))
    unread = sorted({name.rpartition(".")[0] or name for name in traced.unread()})
    if unread:
        more = f" and {len(unread) - _MOST_NAMED} others" if len(unread) > _MOST_NAMED else ""
        texts.append(
            f"parts that the example inputs do not reach: {', '.join(unread[:_MOST_NAMED])}{more}"
        )
    if traced.data_decides:
        texts.append("inputs whose values lead the model another way than the example inputs do")
    rest = [name for name in traced.outputs if name not in names]
    if rest:
        texts.append(f"outputs that were not asked for: {', '.join(rest)}")
    missing = {"another batch size", "another length"} - {
        c.inputs.removeprefix("random inputs of ") for c in checks
    }
    texts += [
        f"inputs of {what}: the model does not take them as they were tried"
        for what in sorted(missing)
    ]
    if any(c.dtype != "float64" for c in checks):
        texts.append("the difference in float64: the model does not run in it")
    return texts
