"""The layer norms of a traced model, by the module whose call runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from effkern.convert.axes import Axis
from effkern.convert.calls import arguments, name_of, shape_of
from effkern.convert.spelled_out import is_row, match
from effkern.convert.states import Lost, Shift, State, sources
from effkern.convert.trace import Trace, is_mark

__all__ = ["Norm", "NormModule", "find_norms", "own_affine", "transfer_norm",
    "with_inline_norms",
]  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """One call of a layer norm over the last dimension."""

    node: Node
    value: Node  # what is normalised
    features: int
    eps: float
    weight: Node | None
    bias: Node | None

    @property
    def axis(self) -> Axis:
        """The feature axis of what is normalised."""
        return Axis(len(shape_of(self.value)) - 1)


@dataclass
class NormModule:
    """The layer norms that run in calls of one module, none of its children's."""

    path: str
    norms: list[Norm]
    alone: bool  # the module's call does nothing else, with affine parameters of its own

    @property
    def features(self) -> int:
        """The size of the feature axis; that of the first, where they differ."""
        return self.norms[0].features

    @property
    def eps(self) -> float:
        """What is added to the variance; that of the first, where they differ."""
        return self.norms[0].eps


def transfer_norm(norm: Norm, states: Mapping[Node, State]) -> State:
    """The state of a converted norm's result: unchanged where it reads a row as it must be read.

    Args:
        norm: the converted one; its operations on the way from value to result do not count.
        states: of its operands.
    """
    value = states[norm.value]
    affine = [states[x] for x in (norm.weight, norm.bias) if x is not None]
    fits = isinstance(value, Shift) and (value.axis, value.scale) == (norm.axis, None)
    if fits and not any(state is not None for state in affine):
        return None
    read = [value, *affine]
    lost = next((state for state in read if isinstance(state, Lost)), Lost(norm.node, 0))
    return lost._replace(sources=sources(read))


def find_norms(trace: Trace) -> list[NormModule]:
    """Every layer norm over the last dimension, grouped by module, in the order of the graph."""
    groups: dict[str, list[Norm]] = {}
    work: dict[str, int] = {}  # operations of a module's own
    for node in trace.graph.nodes:
        if node.op != "call_function" or is_mark(node):
            continue
        path = trace.module(node)
        work[path] = work.get(path, 0) + 1
        if name_of(node) == "aten::layer_norm":
            bound = arguments(node)
            if len(bound["normalized_shape"]) == 1:
                norm = Norm(
                    node,
                    bound["input"],
                    bound["normalized_shape"][0],
                    bound["eps"],
                    bound["weight"],
                    bound["bias"],
                )
                groups.setdefault(path, []).append(norm)
    found = [
        NormModule(path, norms, len(norms) == work[path] and _plain(trace, path, norms))
        for path, norms in groups.items()
    ]
    found += _spelled_out(trace, {path: n for path, n in work.items() if path not in groups})
    return sorted(found, key=lambda group: trace.position[group.norms[0].node])


def _spelled_out(trace: Trace, work: dict[str, int]) -> list[NormModule]:
    """Modules whose calls are layer norms in elementary operations, and nothing else."""
    results: dict[str, list[Node]] = {}
    for node in trace.graph.nodes:
        if is_mark(node):
            site = trace.sites[node.args[1]]
            if site.where == "output" and not site.path and site.module in work:
                results.setdefault(site.module, []).append(node.args[0])
    groups = []
    for path, nodes in results.items():
        norms = []
        done: set[Node] = set()
        for node in nodes:
            found = match(trace, node)
            if found is None:
                break
            features = shape_of(found.value)[-1]
            norms.append(Norm(node, found.value, features, found.eps, found.weight, found.bias))
            done |= found.nodes
        if norms and len(done) == work[path] and _plain(trace, path, norms):
            groups.append(NormModule(path, norms, True))
    return groups


def with_inline_norms(trace: Trace) -> list[str]:
    """Paths of the modules that spell out a layer norm among other operations of their own."""
    done: set[Node] = set()
    for norm in (norm for group in find_norms(trace) for norm in group.norms):
        found = match(trace, norm.node)
        done |= found.nodes if found else set()
    paths = set()
    for node in reversed(trace.graph.nodes):  # the affine belongs to the norm
        found = None if node in done or is_mark(node) else match(trace, node)
        if found is not None and found.value not in trace.parameters:
            done |= found.nodes
            paths.add(trace.module(node))
    return sorted(paths)


def _plain(trace: Trace, path: str, norms: list[Norm]) -> bool:
    """Whether each call of the module is layer_norm(its first argument, its weight, its bias)."""
    first = norms[0]
    if not path or any((n.eps, n.features) != (first.eps, first.features) for n in norms):
        return False
    for norm in norms:
        value = norm.value
        while name_of(value) in ("aten::to", "aten::_to_copy"):
            value = value.args[0]  # type: ignore[assignment]
        if not is_mark(value) or not is_mark(next(iter(norm.node.users))):
            return False
        site = trace.sites[value.args[1]]  # type: ignore[index]
        if site.module != path or site.where != "input" or len(site.path) != 1:
            return False
        affine = norm.weight, norm.bias
        if any(x is not None and not is_row(x, norm.features) for x in affine):
            return False
        if own_affine(trace, path, norm) != own_affine(trace, path, first):
            return False
        if sum(x is not None for x in affine) != len(own_affine(trace, path, norm)):
            return False
    return True


def own_affine(trace: Trace, path: str, norm: Norm) -> dict[str, str]:
    """The names of a norm's weight and bias in its module, where they are the module's own."""
    names = {}
    for role, node in (("weight", norm.weight), ("bias", norm.bias)):
        if node is not None:
            own = (name.rpartition(".") for name in trace.aliases(node))
            found = [name for owner, _, name in own if owner == path]
            if found:
                names[role] = role if role in found else min(found)
    return names
