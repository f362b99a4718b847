"""The conversion of Pre-LN models to Pre-CRMSNorm: a residual stream of d - 1 features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from effkern.convert import checkpoint, folding, structure, training
from effkern.convert.conversion import Changes, Conversion, make, prove, report_of, start
from effkern.convert.folding import Fold
from effkern.convert.plan import Plan, find_plan
from effkern.convert.report import Folded, NotConvertible, Swapped
from effkern.convert.trace import Trace

__all__ = ["to_crmsnorm"]

_DROPOUT = (
    "the features that dropout leaves of d - 1 stand for another row than those that it leaves of d"
)


def to_crmsnorm(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    outputs: Sequence[str] | None = None,
) -> Conversion:
    """Turn a Pre-LN model into an equal Pre-CRMSNorm model, in place.

    Everything that is added to the residual stream is made zero-mean and loses its last feature,
    which is minus the sum of the others; a layer norm that reads the stream is then a CRMSNorm of
    d - 1 features, whose affine is folded into the linear maps that read it (Jiang et al.,
    "Pre-RMSNorm and Pre-CRMSNorm Transformers", NeurIPS 2023, section 3). The d - 1 features are
    stored d wide, with a zero at the end: parameters and activations keep their shapes. A norm
    whose result goes elsewhere than into linear maps of its own gives all d features again.

    The proof is that of `to_rmsnorm`, to which this adds that every operation on the stream treats
    all features alike.

    Args:
        model: as of `to_rmsnorm`; class, methods, state_dict keys and parameter objects stay.
            Weights and biases of folded norms are one and zero, and need no gradient any more.
        example_inputs: as of `to_rmsnorm`.
        outputs: as of `to_rmsnorm`.

    Returns:
        The same model with a report.

    Raises:
        NotConvertible, TypeError, ValueError: as `to_rmsnorm`, and the model is left untouched too.
    """
    traced, names = start("to_crmsnorm", model, example_inputs, outputs)
    plan = _find_plan(traced, names)
    folds = folding.find_folds(traced, plan)
    changes = Changes(
        structure.steps_of(traced, plan, model, folds),
        partial(folding.dropped_weights, traced, plan, folds),
    )
    checks = prove(model, example_inputs, traced, changes, names)
    dropout = training.uses_dropout(model, example_inputs)
    make(model, traced, changes)
    report = report_of("crmsnorm", traced, plan, names, checks, _DROPOUT if dropout else None)
    for group in plan.converted:
        how = _how(folds.get(group.path), group.alone)
        report.swapped.append(Swapped(group.path, group.features, group.eps, how))
    report.folded = _folded(traced, folds)
    checkpoint.let_save_with_mark(model, report.kind, changes.steps)
    return Conversion(model, report, changes.steps)


def _find_plan(traced: Trace, names: list[str]) -> Plan:
    """A plan, or the reason why there is none even for Pre-RMSNorm, if there is none."""
    try:
        return find_plan(traced, names, drop=True)
    except NotConvertible:
        find_plan(traced, names)
        raise


def _how(fold: Fold | None, alone: bool) -> str:
    if fold is not None:
        return "CRMSNorm, affine folded" + (", a one in its last feature" if fold.one else "")
    if alone:
        return "RMSNorm of all features again, module swapped"
    return "RMSNorm of all features again, layer_norm calls run as that"


def _folded(traced: Trace, folds: Mapping[str, Fold]) -> list[Folded]:
    """The parameters that took in an affine, each once."""
    found: dict[str, Folded] = {}
    for path, fold in folds.items():
        for reader in fold.readers:
            name = traced.parameters[reader.weight]
            found[name] = Folded(name, reader.dim, path)
            if fold.bias is not None and not fold.one and reader.bias is not None:
                name = traced.parameters[reader.bias]
                found[name] = Folded(name, None, path)
    return list(found.values())
