"""The conversion of Pre-LN models to Pre-RMSNorm: trace, plan, check, edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effkern.convert import check, structure, training, weights
from effkern.convert.plan import Plan, find_plan
from effkern.convert.report import (
    Check,
    ConversionReport,
    Edit,
    Left,
    NotConvertible,
    Recentred,
    Swapped,
)
from effkern.convert.structure import Step
from effkern.convert.trace import Trace, trace

__all__ = ["Conversion", "to_rmsnorm"]


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


def to_rmsnorm(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    outputs: Sequence[str] | None = None,
) -> Conversion:
    """Turn a Pre-LN model into an equal Pre-RMSNorm model, in place.

    Everything that is added to the residual stream is made zero-mean by editing weights; a layer
    norm that reads the stream is then an RMSNorm (Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm
    Transformers", NeurIPS 2023, section 3). Nothing is known of any architecture: the model is
    traced, and the edits are followed through the whole graph. A comparison of the outputs in
    float64 closes it.

    Args:
        model: any module that `torch.export` can trace. Its class, methods, state_dict keys and
            parameter objects stay.
        example_inputs: a tuple of positional or a dict of keyword arguments. What they do not
            reach (other flags, training mode) is not proved.
        outputs: names of the outputs that must stay equal, such as "pooler_output", or "0" for the
            first of a tuple; everything below a name counts. By default all.

    Returns:
        The same model with a report.

    Raises:
        NotConvertible: with the module's path and the reason; the model is left untouched, bit for
            bit.
        TypeError, ValueError: if an argument is not what it must be.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_rmsnorm: model must be a module, got {type(model).__name__}")
    if not isinstance(example_inputs, tuple | dict):
        raise TypeError(
            "to_rmsnorm: example_inputs must be a tuple or a dict, "
            f"got {type(example_inputs).__name__}"
        )
    traced = trace(model, example_inputs)
    names = _chosen(list(traced.outputs), outputs)
    plan = find_plan(traced, names)
    steps = structure.steps_of(traced, plan, model)
    checks = _prove(model, example_inputs, traced, plan, steps, names)
    record = _record(traced, plan, training.uses_dropout(model, example_inputs))
    new = weights.edited_weights(traced, plan)
    structure.apply(model, steps)
    vars(model)[training.ATTRIBUTE] = record
    with torch.no_grad():
        for name, value in new.items():
            traced.tensors[name].copy_(value)
    report = _report(traced, plan, names, checks, record.dropout)
    return Conversion(model, report, steps)


def _chosen(names: list[str], outputs: Sequence[str] | None) -> list[str]:
    """The outputs that must stay equal, by their full names."""
    if outputs is None:
        return names
    if isinstance(outputs, str):
        raise TypeError("to_rmsnorm: outputs must be a sequence of names, got a string")
    chosen: list[str] = []
    for wanted in map(str, outputs):
        found = [name for name in names if name == wanted or name.startswith(f"{wanted}.")]
        if not found:
            raise ValueError(
                f"to_rmsnorm: outputs names {wanted!r}, but the model returns {', '.join(names)}"
            )
        chosen += found
    return chosen


def _prove(
    model: nn.Module,
    inputs: check.Inputs,
    traced: Trace,
    plan: Plan,
    steps: list[Step],
    names: list[str],
) -> list[Check]:
    """Compare before and after in float64, or in the model's dtype where it cannot run in that.

    Leaves the model as it was.
    """
    try:
        with weights.in_float64(model), check.computing_in_float64():
            check.outputs_of(model, inputs, wide=True)
    except Exception:  # whatever stops it, the model's own dtype is left to try
        return _compared_in_own_dtype(model, inputs, traced, plan, steps, names)
    with weights.in_float64(model) as twins, check.computing_in_float64():
        return _compared(model, inputs, traced, plan, steps, names, torch.float64, twins)


def _compared_in_own_dtype(
    model: nn.Module,
    inputs: check.Inputs,
    traced: Trace,
    plan: Plan,
    steps: list[Step],
    names: list[str],
) -> list[Check]:
    edited = [traced.parameters[node] for node in (*plan.edits, *plan.ones)]
    kept = {name: traced.tensors[name].detach().clone() for name in edited}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        return _compared(model, inputs, traced, plan, steps, names, dtype, traced.tensors)
    finally:
        for name, value in kept.items():
            traced.tensors[name].data.copy_(value)


def _compared(
    model: nn.Module,
    inputs: check.Inputs,
    traced: Trace,
    plan: Plan,
    steps: list[Step],
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
    for name, value in weights.edited_weights(traced, plan, tensors).items():
        tensors[name].data.copy_(value)
    take_back = structure.apply(model, steps)
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


def _record(traced: Trace, plan: Plan, dropout: bool) -> training.Record:
    """What brings the original parameters back."""
    record = training.Record(dropout=dropout)
    for node, key in plan.edits.items():
        name = traced.parameters[node]
        scale = None if key.scale is None else traced.tensors[traced.parameters[key.scale]]
        value = traced.tensors[name].detach().double()
        product = weights.scaled(
            value, key.axis, key.features, None if scale is None else scale.detach().double()
        )
        record.edits.append(
            training.EditRecord(
                sorted(traced.aliases(node)),
                traced.readers(node),
                key.axis,
                key.features,
                weights.mean_along(product, key.axis, key.features),
                None if key.scale is None else traced.parameters[key.scale],
            )
        )
    for node in plan.ones:
        value = traced.tensors[traced.parameters[node]].detach().clone()
        record.scales.append(
            training.ScaleRecord(sorted(traced.aliases(node)), traced.readers(node), value)
        )
    return record


def _report(
    traced: Trace, plan: Plan, names: list[str], checks: list[Check], dropout: bool
) -> ConversionReport:
    report = ConversionReport(
        kind="rmsnorm",
        features=sorted({group.features for group in plan.converted}),
        left=[Left(path, reason) for path, reason in plan.left.items()],
        outputs=names,
        checks=checks,
    )
    for node, key in plan.edits.items():
        scale = None if key.scale is None else traced.parameters[key.scale]
        report.edits.append(Edit(traced.parameters[node], key.axis.dim, key.features, scale))
    for site, key in plan.sites.items():
        dim = key.axis.dim - key.node.meta["val"].dim()
        report.recentred.append(Recentred(site.module, str(site), dim, plan.serves[site]))
    for group in plan.converted:
        how = "module swapped" if group.alone else "layer_norm calls run as rms_norm"
        report.swapped.append(Swapped(group.path, group.features, group.eps, how))
    report.not_covered = _not_covered(traced, names, checks, dropout)
    return report


def _not_covered(traced: Trace, names: list[str], checks: list[Check], dropout: bool) -> list[str]:
    texts = [
        "what the example inputs do not reach: other arguments and flags, and sizes other than "
        "those checked",
    ]
    texts.append(
        "training mode"
        + (
            ": dropout between a centred weight and the stream leaves rows whose mean is not zero "
            "(train in effkern.convert.training_form)"
            if dropout
            else ""
        )
    )
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
