"""Which norms' affines can be folded into the linear maps that read them, and folding them.

What a norm gives, before its affine, is centred: it goes with d - 1 features to where it is read,
if every way it takes only moves rows about and ends in a linear map over the features whose weight
nothing else uses. Elsewhere the norm has to give all d features, with its affine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from effkern.convert.axes import Axis
from effkern.convert.calls import arguments, name_of, shape_of
from effkern.convert.layout_rules import permutation
from effkern.convert.norms import Norm, NormModule
from effkern.convert.plan import Plan
from effkern.convert.rules import reads_shape_only, transfer
from effkern.convert.runtime import FoldedCRMSNorm
from effkern.convert.states import Shift
from effkern.convert.trace import Trace, is_mark
from effkern.convert.weights import as_before, centred_weights, split

__all__ = ["Fold", "Reader", "dropped_weights", "find_folds"]


class Reader(NamedTuple):
    """A linear map over the features of what a norm gives."""

    node: Node
    weight: Node  # a matrix, a parameter
    dim: int  # the dimension of the matrix that is summed over
    bias: Node | None  # a parameter of one entry for each output; None where it has no such bias


@dataclass
class Fold:
    """A norm whose affine goes into its readers.

    Attributes:
        weight, bias: the norm's own, where it has them.
        readers: all of them.
        one: whether the norm gives a one in place of the last feature, which the readers' weights
            multiply by what the norm's bias adds to their results; else their biases take that.
    """

    group: NormModule
    weight: Node | None
    bias: Node | None
    readers: list[Reader] = field(default_factory=list)
    one: bool = False


def find_folds(trace: Trace, plan: Plan) -> dict[str, Fold]:
    """The norms that can be folded, of those that a plan converts, by their modules' paths."""
    folds = {}
    for group in plan.converted:
        fold = _fold_of(trace, plan, group)
        if fold is not None:
            folds[group.path] = fold
    while True:
        of_reader = {reader.node: path for path, fold in folds.items() for reader in fold.readers}
        bad = {path for path, fold in folds.items() if not _own(trace, plan, fold, of_reader)}
        if not bad:
            break
        folds = {path: fold for path, fold in folds.items() if path not in bad}
    for fold in folds.values():
        fold.one = fold.bias is not None and not _biases_take_it(trace, fold)
    return folds


def _fold_of(trace: Trace, plan: Plan, group: NormModule) -> Fold | None:
    """A norm with its readers; None where something else reads it."""
    first = group.norms[0]
    if not group.alone or any(
        (n.weight, n.bias) != (first.weight, first.bias) for n in group.norms
    ):
        return None
    for node in (first.weight, first.bias):
        if node is not None and (
            node not in trace.parameters
            or node in plan.edits
            or trace.overlaps(node) is not None
            or trace.readers(node) != [group.path]
        ):
            return None
    fold = Fold(group, first.weight, first.bias)
    for norm in group.norms:
        found = _readers(trace, plan, norm)
        if found is None:
            return None
        fold.readers += found
    return fold


#: Operations whose results are rows of their operand, or means of rows.
_KEEPS_ROWS = {
    "effkern_trace::mark", "getitem", "aten::clone", "aten::contiguous", "aten::detach",
    "aten::alias", "aten::to", "aten::_to_copy", "aten::type_as", "aten::dropout", "aten::view",
    "aten::_unsafe_view", "aten::reshape", "aten::flatten", "aten::unflatten", "aten::squeeze",
    "aten::unsqueeze", "aten::permute", "aten::transpose", "aten::t", "aten::movedim",
    "aten::expand", "aten::repeat", "aten::slice", "aten::narrow", "aten::select", "aten::split",
    "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::index", "aten::index_select",
    "aten::gather", "aten::mean",
}  # fmt: skip


def _readers(trace: Trace, plan: Plan, norm: Norm) -> list[Reader] | None:
    """What reads a norm's result, if nothing but linear maps over its features does."""
    carried: dict[Node, Any] = {norm.node: Shift(norm.axis, norm.features, True)}
    readers = []
    for node in list(trace.graph.nodes)[trace.position[norm.node] + 1 :]:
        if not any(operand in carried for operand in node.all_input_nodes):
            continue
        if node.op != "call_function":
            return None
        if reads_shape_only(node):
            continue
        if name_of(node) in _KEEPS_ROWS:
            if is_mark(node) and trace.sites[node.args[1]] in plan.sites:  # type: ignore[index]
                return None
            state = transfer(node, {x: carried.get(x) for x in node.all_input_nodes})
            if not all(
                isinstance(s, Shift) for s in (state if isinstance(state, list) else [state])
            ):
                return None
            carried[node] = state
            continue
        reader = _reader(trace, node, carried)
        if reader is None:
            return None
        readers.append(reader)
    return readers


def _reader(trace: Trace, node: Node, carried: dict[Node, Any]) -> Reader | None:
    """An operation as a linear map over the features of its one carried operand."""
    name = name_of(node)
    if name == "aten::linear":
        bound = arguments(node)
        x, weight, bias, dim = bound["input"], bound["weight"], bound["bias"], 1
    elif name == "aten::addmm":
        bound = arguments(node)
        if bound["beta"] != 1 or bound["alpha"] != 1:
            return None
        x, weight, bias, dim = bound["mat1"], bound["mat2"], bound["self"], 0
    elif name in ("aten::matmul", "aten::mm"):
        (x, weight), bias, dim = node.args[:2], None, 0
    else:
        return None
    state = carried.get(x)
    if (
        not isinstance(state, Shift)
        or state.axis != Axis(len(shape_of(x)) - 1)
        or weight in carried
        or bias in carried
        or len(shape_of(weight)) != 2
    ):
        return None
    found = _matrix(trace, weight, dim)
    if found is None:
        return None
    own = bias in trace.parameters and shape_of(bias) == (shape_of(weight)[1 - dim],)
    return Reader(node, *found, bias if own else None)


_KEEPS_MATRIX = (
    "effkern_trace::mark", "aten::clone", "aten::contiguous", "aten::detach", "aten::alias",
    "aten::to", "aten::_to_copy",
)  # fmt: skip
_TRANSPOSES = ("aten::t", "aten::transpose", "aten::permute", "aten::numpy_T", "aten::mT")


def _matrix(trace: Trace, node: Any, dim: int) -> tuple[Node, int] | None:
    """The parameter that a matrix is, or is the transposed of, with its dimension for ``dim``."""
    while isinstance(node, Node) and node.op == "call_function" and len(shape_of(node)) == 2:
        if name_of(node) in _TRANSPOSES:
            dim = permutation(node)[dim]
        elif name_of(node) not in _KEEPS_MATRIX:
            return None
        node = node.args[0]
    return (node, dim) if node in trace.parameters and len(shape_of(node)) == 2 else None


def _own(trace: Trace, plan: Plan, fold: Fold, of_reader: dict[Node, str]) -> bool:
    """Whether every reader's weight is used by this norm's readers alone, and in one way."""
    dims: dict[str, int] = {}
    for reader in fold.readers:
        name = min(trace.aliases(reader.weight))
        if dims.setdefault(name, reader.dim) != reader.dim or trace.overlaps(reader.weight):
            return False
        edit = _edit_of(trace, plan, reader.weight)
        if edit is not None and edit.axis.dim == reader.dim:
            return False
        if any(of_reader.get(use) != fold.group.path for use in _uses(trace, reader.weight)):
            return False
    return True


def _edit_of(trace: Trace, plan: Plan, parameter: Node) -> Any:
    names = trace.aliases(parameter)
    return next((k for node, k in plan.edits.items() if trace.parameters[node] in names), None)


def _uses(trace: Trace, parameter: Node) -> set[Node]:
    """The operations that a parameter's tensor comes to, past what `_matrix` sees through."""
    names = trace.aliases(parameter)
    pending = [node for node, name in trace.parameters.items() if name in names]
    found = set()
    while pending:
        for user in pending.pop().users:
            if name_of(user) in _KEEPS_MATRIX + _TRANSPOSES:
                pending.append(user)
            else:
                found.add(user)
    return found


def _biases_take_it(trace: Trace, fold: Fold) -> bool:
    """Whether each weight has a bias of its own, beside which it is used everywhere."""
    weight_of: dict[str, str] = {}
    bias_of: dict[str, str] = {}
    nodes = {reader.node for reader in fold.readers}
    for reader in fold.readers:
        if reader.bias is None or trace.overlaps(reader.bias) is not None:
            return False
        weight, bias = (min(trace.aliases(node)) for node in (reader.weight, reader.bias))
        if weight_of.setdefault(bias, weight) != weight or bias_of.setdefault(weight, bias) != bias:
            return False
        if not _uses(trace, reader.bias) <= nodes:
            return False
    return True


def dropped_weights(
    trace: Trace, plan: Plan, folds: Mapping[str, Fold], old: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The new values of all edited parameters, by name: centred ones have lost their last feature,
    readers have taken in the norms' affines, which are one and zero.
    """  # fmt: skip
    new = centred_weights(trace, plan, old)
    for node, key in plan.edits.items():
        parts = split(new[trace.parameters[node]], key.axis, key.features)
        parts.select(key.axis.dim + 1, key.features - 1).zero_()
    for fold in folds.values():
        _fold_into(trace, fold, new, old)
    return as_before(new, old)


def _fold_into(trace: Trace, fold: Fold, new: dict[str, Tensor], old: Mapping[str, Tensor]) -> None:
    def name(node: Node) -> str:
        names = trace.aliases(node)
        return next((each for each in names if each in new), trace.parameters[node])

    def wide(node: Node) -> Tensor:
        return new[name(node)] if name(node) in new else old[name(node)].detach().double()

    features = fold.group.features
    scale = None if fold.weight is None else wide(fold.weight).clone()
    shift = None if fold.bias is None else wide(fold.bias).flatten()
    done = set()
    for reader in fold.readers:
        if name(reader.weight) in done:
            continue
        matrix = wide(reader.weight)
        along = (features, 1) if reader.dim == 0 else (1, features)
        added = None if shift is None else matrix.movedim(reader.dim, -1) @ shift
        if scale is not None:
            matrix = matrix * scale.view(along)
        last = matrix.narrow(reader.dim, features - 1, 1)
        matrix = (matrix - last) * FoldedCRMSNorm.left_to_readers(features)
        if added is not None and fold.one:
            matrix.select(reader.dim, features - 1).copy_(added)
        elif added is not None:
            assert reader.bias is not None
            new[name(reader.bias)] = wide(reader.bias) + added
        new[name(reader.weight)] = matrix
        done.add(name(reader.weight))
    for node, value in ((fold.weight, 1.0), (fold.bias, 0.0)):
        if node is not None:
            new[name(node)] = torch.full_like(wide(node), value)
