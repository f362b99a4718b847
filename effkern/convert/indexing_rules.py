"""Transfer rules of operations that pick or replace whole rows of features by numbers or masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from effkern.convert.axes import Axis, through_broadcast
from effkern.convert.calls import arguments, constant_along, is_zero, shape_of
from effkern.convert.rules import Given, combine, lost, rule, shift_of
from effkern.convert.states import Shift, State

__all__: list[str] = []

_MASKS = (torch.bool, torch.uint8)


@rule("aten::embedding")
def embedding(node: Node, given: Given) -> State:
    """Rows of a table."""
    bound = arguments(node)
    state = given(bound["weight"])
    if not isinstance(state, Shift) or state.axis.dim != 1 or given(bound["indices"]) is not None:
        return lost(node, given)
    return state._replace(axis=state.axis._replace(dim=len(shape_of(node)) - 1))


def indexed_axis(axis: Axis, indices: Sequence[Node | None]) -> Axis | None:
    """The axis after ``x[indices]``; None where the feature dimension is itself indexed."""
    dim = 0
    used: list[int] = []
    ranks: list[int] = []
    for index in indices:
        if index is None:
            dim += 1
            continue
        value = index.meta["val"]
        mask = value.dtype in _MASKS
        width = value.dim() if mask else 1
        used += range(dim, dim + width)
        ranks.append(1 if mask else value.dim())
        dim += width
    if axis.dim in used or not used:
        return None
    rank = max(ranks)
    together = used == list(range(used[0], used[-1] + 1))
    first = used[0] if together else 0
    before = sum(1 for entry in range(axis.dim) if entry not in used)
    return axis._replace(dim=before + (rank if before >= first else 0))


@rule("aten::index")
def index(node: Node, given: Given) -> State:
    """Rows picked by numbers or by a mask."""
    bound = arguments(node)
    state = given(bound["self"])
    if not isinstance(state, Shift) or len(given.states) > 1:
        return lost(node, given)
    axis = indexed_axis(state.axis, bound["indices"])
    return lost(node, given) if axis is None else state._replace(axis=axis)


@rule("aten::index_put")
def index_put(node: Node, given: Given) -> State:
    """Rows replaced, or added to, by others."""
    bound = arguments(node)
    source, values = bound["self"], bound["values"]
    state = given(source)
    reference = shift_of(state) or shift_of(given(values))
    if reference is None or any(given(i) is not None for i in bound["indices"] if i is not None):
        return lost(node, given)
    axis = reference.axis if shift_of(state) else None
    if axis is None:
        axis = _axis_before_index(reference, source, bound["indices"], values)
    placed = None if axis is None else indexed_axis(axis, bound["indices"])
    if axis is None or placed is None:
        return lost(node, given)
    # values are broadcast to what the index picks, whose rank is that of x[indices]
    rank = _indexed_rank(len(shape_of(source)), bound["indices"])
    there = given(values)
    if isinstance(there, Shift):
        if through_broadcast(there.axis, len(shape_of(values)), rank) != placed:
            return lost(node, given)
        there = there._replace(axis=axis)
    return combine(node, given, [(source, state), (values, there)])


def _indexed_rank(dims: int, indices: Sequence[Node | None]) -> int:
    taken = rank = 0
    for entry in indices:
        if entry is not None:
            value = entry.meta["val"]
            mask = value.dtype in _MASKS
            taken += value.dim() if mask else 1
            rank = max(rank, 1 if mask else value.dim())
    return dims - taken + rank


def _axis_before_index(
    shift: Shift, source: Node, indices: Sequence[Node | None], values: Node
) -> Axis | None:
    rank = _indexed_rank(len(shape_of(source)), indices)
    placed = through_broadcast(shift.axis, len(shape_of(values)), rank)
    for dim in range(len(shape_of(source))):
        tried = shift.axis._replace(dim=dim)
        if indexed_axis(tried, indices) == placed:
            return tried
    return None


@rule("aten::gather", "aten::take_along_dim")
def gather(node: Node, given: Given) -> State:
    """Rows picked by numbers that are the same for every feature."""
    bound = arguments(node)
    numbers = bound.get("index", bound.get("indices"))
    state = given(bound["self"])
    dims = len(shape_of(node))
    if (
        not isinstance(state, Shift)
        or given(numbers) is not None
        or bound["dim"] is None
        or bound["dim"] % dims == state.axis.dim
        or shape_of(node)[state.axis.dim] != shape_of(bound["self"])[state.axis.dim]
        or not constant_along(numbers, state.axis, dims)
    ):
        return lost(node, given)
    return state


@rule("aten::scatter", "aten::scatter_add", "aten::index_add", "aten::index_copy",
      "aten::slice_scatter", "aten::select_scatter", "aten::masked_scatter")  # fmt: skip
def scatter(node: Node, given: Given) -> State:
    """Rows replaced, or added to, by other rows."""
    bound = arguments(node)
    source = bound["self"]
    values = next((bound[key] for key in ("src", "source", "value") if key in bound), None)
    dims = len(shape_of(source))
    state, there = given(source), given(values)
    reference = shift_of(state) or shift_of(there)
    if reference is None or reference.scale is not None:
        return lost(node, given)
    axis = reference.axis
    name = node.target._schema.name  # type: ignore[union-attr]
    if name == "aten::select_scatter" and shift_of(there):
        dim = bound["dim"] % dims
        assert isinstance(there, Shift)
        there = there._replace(
            axis=there.axis._replace(dim=there.axis.dim + (there.axis.dim >= dim))
        )
        axis = state.axis if isinstance(state, Shift) else there.axis
    if name == "aten::masked_scatter":
        if axis.dim != dims - 1 or shape_of(source)[-1] != reference.features:
            return lost(node, given)
        if not constant_along(bound["mask"], axis, dims) or given(bound["mask"]) is not None:
            return lost(node, given)
        if isinstance(there, Shift):
            last = len(shape_of(values)) - 1
            if there.axis != Axis(last):
                return lost(node, given)
            there = there._replace(axis=axis)
        elif not (there is None and shape_of(values)[-1:] == shape_of(source)[-1:]):
            return lost(node, given)
    elif bound["dim"] % dims == axis.dim:
        return lost(node, given)
    if name in ("aten::scatter", "aten::scatter_add"):
        numbers = bound["index"]
        if (
            given(numbers) is not None
            or shape_of(numbers)[axis.dim] != shape_of(source)[axis.dim]
            or not constant_along(numbers, axis, dims)
        ):
            return lost(node, given)
        if isinstance(values, Node) and shape_of(values)[axis.dim] != shape_of(source)[axis.dim]:
            return lost(node, given)
    elif "index" in bound and given(bound["index"]) is not None:
        return lost(node, given)
    return combine(node, given, [(source, state), (values, there)])


@rule("aten::copy")
def copy(node: Node, given: Given) -> State:
    """The second value, broadcast to the shape of the first."""
    bound = arguments(node)
    state = given(bound["src"])
    if not isinstance(state, Shift):
        return None if state is None else lost(node, given)
    dims = len(shape_of(bound["src"]))
    return state._replace(axis=through_broadcast(state.axis, dims, len(shape_of(node))))


@rule("aten::where")
def where(node: Node, given: Given) -> State:
    """Rows of one value or of another."""
    bound = arguments(node)
    if "self" not in bound or given(bound["condition"]) is not None:
        return lost(node, given)
    total = combine(node, given, [(bound[key], given(bound[key])) for key in ("self", "other")])
    if isinstance(total, Shift) and constant_along(
        bound["condition"], total.axis, len(shape_of(node))
    ):
        return total
    return lost(node, given)


@rule("aten::masked_fill")
def masked_fill(node: Node, given: Given) -> State:
    """Rows replaced by a number."""
    bound = arguments(node)
    state = given(bound["self"])
    dims = len(shape_of(node))
    if (
        not isinstance(state, Shift)
        or state.scale is not None
        or len(given.states) > 1
        or not constant_along(bound["mask"], state.axis, dims)
        or len(shape_of(bound["self"])) != dims
    ):
        return lost(node, given)
    # A row of one number has no mean left once it is centred, only zeros; but it was not edited.
    return state._replace(centred=state.centred and is_zero(bound["value"]))
