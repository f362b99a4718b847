"""The changes to a model's modules, as plain data, and applying or undoing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from effkern.convert.calls import shape_of
from effkern.convert.folding import Fold
from effkern.convert.norms import NormModule, own_affine
from effkern.convert.plan import Plan
from effkern.convert.runtime import (
    BiasedRMSNorm,
    ExpandedRMSNorm,
    FoldedCRMSNorm,
    RecentreInput,
    RecentreOutput,
    RunWithRmsNorm,
)
from effkern.convert.trace import Trace, positional_names

__all__ = ["apply", "steps_of"]

#: One change: its ``kind``, the ``module`` that it is made to, what that kind needs; JSON holds it.
Step = dict[str, Any]


def steps_of(
    trace: Trace, plan: Plan, model: nn.Module, folds: Mapping[str, Fold] | None = None
) -> list[Step]:
    """The changes that a plan makes to modules.

    Args:
        trace: of the model.
        plan: what is converted and where it is recentred.
        model: the model.
        folds: for Pre-CRMSNorm, which norms' affines go into their readers; None for Pre-RMSNorm.
    """
    steps: list[Step] = []
    drop = {} if folds is None else {"drop": True}
    for group in plan.converted:
        if group.alone:
            swap = {
                "kind": "swap",
                "module": group.path,
                "features": group.features,
                "eps": group.eps,
            }
            affine = own_affine(trace, group.path, group.norms[0])
            if any(role != name for role, name in affine.items()):
                swap["affine"] = affine
            fold = (folds or {}).get(group.path)
            steps.append(swap | ({"folded": True, "one": fold.one} if fold else drop))
        else:
            steps.append(
                {
                    "kind": "run with rms_norm",
                    "module": group.path,
                    "features": sorted({norm.features for norm in group.norms}),
                    "parameters": _affine_names(trace, group, model),
                }
                | drop
            )
    for site, key in plan.sites.items():
        dim = key.axis.dim - len(shape_of(key.node))
        steps.append(
            {
                "kind": "recentre",
                "module": site.module,
                "where": site.where,
                "path": list(site.path),
                "dim": dim,
            }
            | drop
        )
    swapped = {group.path.rpartition(".")[0] for group in plan.converted}
    for path, module in model.named_modules():
        if path in swapped and isinstance(module, nn.TransformerEncoderLayer):
            steps.append({"kind": "no fast path", "module": path})
    return steps


def _affine_names(trace: Trace, group: NormModule, model: nn.Module) -> list[str]:
    """The layer norms' own parameters, by their names below the group's module."""
    prefix = f"{group.path}." if group.path else ""
    names = set()
    for norm in group.norms:
        for node in (norm.weight, norm.bias):
            if node is not None:
                names |= {
                    name.removeprefix(prefix)
                    for name in trace.aliases(node)
                    if name.startswith(prefix)
                }
    return sorted(names)


def apply(model: nn.Module, steps: list[Step]) -> Callable[[], None]:
    """Make the changes; returns the function that takes them back."""
    undo: list[Callable[[], None]] = []
    for step in steps:
        undo.append(_KINDS[step["kind"]](model.get_submodule(step["module"]), step))

    def take_back() -> None:
        for each in reversed(undo):
            each()

    return take_back


def _swap(module: nn.Module, step: Step) -> Callable[[], None]:
    """The module becomes an RMSNorm where it stands: parameters, hooks and identity stay."""
    kind, before = type(module), dict(vars(module))
    vars(module).update(eps=step["eps"])
    for name in ("weight", "bias"):
        if not hasattr(module, name):
            module.register_parameter(name, None)
    affine = step.get("affine")
    if affine:
        vars(module)["affine_names"] = affine.get("weight", "weight"), affine.get("bias", "bias")
    if any(p is not None and p.dim() > 1 for p in module._parameters.values()):
        vars(module)["affine_has_ones"] = True
    vars(module)["elementwise_affine"] = bool(affine) or module.weight is not None
    if step.get("folded"):
        module.__class__ = FoldedCRMSNorm
        vars(module).update(d=step["features"], one=step["one"])
        needed = [(p, p.requires_grad) for p in module.parameters(recurse=False)]
    else:
        module.__class__ = ExpandedRMSNorm if step.get("drop") else BiasedRMSNorm
        vars(module).update(normalized_shape=(step["features"],))
        needed = []
    for parameter, _ in needed:
        parameter.requires_grad_(False)
    added = set(module._parameters) - set(before["_parameters"])
    own = {name: module._parameters[name] for name in module._parameters if name not in added}

    def undo() -> None:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(before)
        module._parameters.clear()
        module._parameters.update(own)
        for parameter, wanted in needed:
            parameter.requires_grad_(wanted)

    return undo


def _run_with_rms_norm(module: nn.Module, step: Step) -> Callable[[], None]:
    before = vars(module).get("forward")
    module.forward = RunWithRmsNorm(  # type: ignore[method-assign, assignment]
        module, tuple(step["features"]), step["parameters"], step.get("drop", False)
    )

    def undo() -> None:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before

    return undo


def _recentre(module: nn.Module, step: Step) -> Callable[[], None]:
    path, dim, drop = tuple(step["path"]), step["dim"], step.get("drop", False)
    if step["where"] == "output":
        return module.register_forward_hook(RecentreOutput(path, dim, drop), prepend=True).remove
    names = positional_names(module)
    position = names.index(path[0]) if path[0] in names else None
    hook = RecentreInput(str(path[0]), position, path[1:], dim, drop)
    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _no_fast_path(module: nn.Module, step: Step) -> Callable[[], None]:
    """nn.TransformerEncoderLayer fuses its layer norms where it knows its activation."""
    before = module.activation_relu_or_gelu
    module.activation_relu_or_gelu = 0  # type: ignore[assignment]

    def undo() -> None:
        module.activation_relu_or_gelu = before

    return undo


_KINDS: dict[str, Callable[[nn.Module, Step], Callable[[], None]]] = {
    "swap": _swap,
    "run with rms_norm": _run_with_rms_norm,
    "recentre": _recentre,
    "no fast path": _no_fast_path,
}
