"""The conversion of Pre-LN models to Pre-RMSNorm: trace, plan, check, edit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from effkern.convert import structure, training, weights
from effkern.convert.conversion import Changes, Conversion, make, prove, report_of, start
from effkern.convert.plan import Plan, find_plan
from effkern.convert.report import Swapped
from effkern.convert.trace import Trace

__all__ = ["to_rmsnorm"]

_DROPOUT = (
    "dropout between a centred weight and the stream leaves rows whose mean is not zero "
    "(train in effkern.convert.training_form)"
)


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
    traced, names = start("to_rmsnorm", model, example_inputs, outputs)
    plan = find_plan(traced, names)
    changes = Changes(
        structure.steps_of(traced, plan, model), partial(weights.edited_weights, traced, plan)
    )
    checks = prove(model, example_inputs, traced, changes, names)
    record = _record(traced, plan, training.uses_dropout(model, example_inputs))
    make(model, traced, changes)
    vars(model)[training.ATTRIBUTE] = record
    report = report_of("rmsnorm", traced, plan, names, checks, _DROPOUT if record.dropout else None)
    for group in plan.converted:
        how = "module swapped" if group.alone else "layer_norm calls run as rms_norm"
        report.swapped.append(Swapped(group.path, group.features, group.eps, how))
    return Conversion(model, report, changes.steps)


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
