"""The changes to a model's modules, as plain data, and applying or undoing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from effkern.convert.calls import shape_of
from effkern.convert.norms import NormModule
from effkern.convert.plan import Plan
from effkern.convert.runtime import BiasedRMSNorm, RecentreInput, RecentreOutput, RunWithRmsNorm
from effkern.convert.trace import Trace, positional_names

__all__ = ["apply", "steps_of"]

#: One change: its ``kind``, the ``module`` that it is made to, what that kind needs; JSON holds it.
Step = dict[str, Any]


def steps_of(trace: Trace, plan: Plan, model: nn.Module) -> list[Step]:
    """The changes that a plan makes to modules."""
    steps: list[Step] = []
    for group in plan.converted:
        if group.alone:
            steps.append(
                {
                    "kind": "swap",
                    "module": group.path,
                    "features": group.features,
                    "eps": group.eps,
                }
            )
        else:
            steps.append(
                {
                    "kind": "run with rms_norm",
                    "module": group.path,
                    "features": sorted({norm.features for norm in group.norms}),
                    "parameters": _affine_names(trace, group, model),
                }
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
    """The module becomes a `BiasedRMSNorm` where it stands: parameters, hooks and identity stay."""
    kind, before = type(module), dict(vars(module))
    shape = (step["features"],)
    module.__class__ = BiasedRMSNorm
    vars(module).update(normalized_shape=shape, eps=step["eps"])
    for name in ("weight", "bias"):
        if not hasattr(module, name):
            module.register_parameter(name, None)
    vars(module)["elementwise_affine"] = module.weight is not None
    added = set(module._parameters) - set(before["_parameters"])
    own = {name: module._parameters[name] for name in module._parameters if name not in added}

    def undo() -> None:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(before)
        module._parameters.clear()
        module._parameters.update(own)

    return undo


def _run_with_rms_norm(module: nn.Module, step: Step) -> Callable[[], None]:
    before = vars(module).get("forward")
    module.forward = RunWithRmsNorm(module, tuple(step["features"]), step["parameters"])  # type: ignore[method-assign, assignment]

    def undo() -> None:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before

    return undo


def _recentre(module: nn.Module, step: Step) -> Callable[[], None]:
    path, dim = tuple(step["path"]), step["dim"]
    if step["where"] == "output":
        return module.register_forward_hook(RecentreOutput(path, dim), prepend=True).remove
    names = positional_names(module)
    position = names.index(path[0]) if path[0] in names else None
    hook = RecentreInput(str(path[0]), position, path[1:], dim)
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
