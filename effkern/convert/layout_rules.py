"""Transfer rules of operations that move, copy or drop whole rows of features by their place."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from effkern.convert.axes import Axis, through_broadcast, through_permutation, through_view
from effkern.convert.calls import arguments, is_floating, shape_of
from effkern.convert.rules import Given, combine, lost, rule
from effkern.convert.states import One, Shift, State

__all__: list[str] = []


@rule(
    "aten::clone", "aten::contiguous", "aten::detach", "aten::detach_", "aten::alias",
    "aten::lift_fresh_copy", "aten::to", "aten::_to_copy", "aten::type_as", "aten::positive",
    "aten::neg", "effkern_trace::mark",
)  # fmt: skip
def same(node: Node, given: Given) -> State:
    """Every entry stays, or all change their sign."""
    state = given(node.args[0])
    return state if is_floating(node) else lost(node, given)


@rule("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::native_dropout")
def dropout(node: Node, given: Given) -> State:
    """Nothing, outside training."""
    bound = arguments(node)
    if bound["train"] and bound["p"] > 0:
        return lost(node, given)
    return given(bound["input"])


@rule(
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::view_as", "aten::flatten",
    "aten::unflatten", "aten::squeeze", "aten::unsqueeze", "aten::reshape_as",
    "aten::_reshape_alias", "aten::atleast_2d", "aten::atleast_3d",
)  # fmt: skip
def view(node: Node, given: Given) -> State:
    """The same entries in row-major order, of another shape."""
    source = node.args[0]
    state = given(source)
    if isinstance(state, One):
        return state
    if not isinstance(state, Shift) or len(given.states) > 1:
        return lost(node, given)
    axis = through_view(state.axis, state.features, shape_of(source), shape_of(node))
    return lost(node, given) if axis is None else state._replace(axis=axis)


def permutation(node: Node) -> list[int]:
    """The order of dimensions that a permuting operation makes."""
    bound = arguments(node)
    dims = len(shape_of(node))
    order = list(range(dims))
    name = node.target._schema.name  # type: ignore[union-attr]
    if name == "aten::permute":
        return [dim % dims for dim in bound["dims"]]
    if name in ("aten::t", "aten::numpy_T", "aten::mT", "aten::matrix_H", "aten::mH"):
        first, second = (-1, -2) if dims >= 2 else (0, 0)
        if name == "aten::numpy_T":
            return order[::-1]
    elif name == "aten::movedim":
        moved = [bound["source"]] if isinstance(bound["source"], int) else bound["source"]
        to = (
            [bound["destination"]]
            if isinstance(bound["destination"], int)
            else bound["destination"]
        )
        rest = iter([dim for dim in order if dim not in {m % dims for m in moved}])
        places = {t % dims: m % dims for m, t in zip(moved, to, strict=True)}
        return [places[dim] if dim in places else next(rest) for dim in order]
    else:
        first, second = (
            (bound["dim0"], bound["dim1"]) if "dim0" in bound else (bound["axis0"], bound["axis1"])
        )
    if dims:
        order[first], order[second] = order[second], order[first]
    return order


@rule(
    "aten::permute", "aten::transpose", "aten::t", "aten::numpy_T", "aten::mT", "aten::swapaxes",
    "aten::swapdims", "aten::movedim", "aten::adjoint",
)  # fmt: skip
def permute(node: Node, given: Given) -> State:
    """The dimensions in another order."""
    state = given(node.args[0])
    if isinstance(state, One):
        return state
    if not isinstance(state, Shift) or node.target._schema.name == "aten::adjoint":  # type: ignore[union-attr]
        return lost(node, given)
    return state._replace(axis=through_permutation(state.axis, permutation(node)))


@rule("aten::expand", "aten::expand_as", "aten::broadcast_to")
def expand(node: Node, given: Given) -> State:
    """Copies along other dimensions."""
    source = node.args[0]
    state = given(source)
    if isinstance(state, One):
        return state
    if not isinstance(state, Shift) or len(given.states) > 1:
        return lost(node, given)
    dims = len(shape_of(node))
    return state._replace(axis=through_broadcast(state.axis, len(shape_of(source)), dims))


@rule("aten::repeat", "aten::tile")
def repeat(node: Node, given: Given) -> State:
    """Copies along other dimensions."""
    source = node.args[0]
    state = given(source)
    if not isinstance(state, Shift):
        return lost(node, given)
    shape, new = shape_of(source), shape_of(node)
    axis = through_broadcast(state.axis, len(shape), len(new))
    if new[axis.dim] != shape[state.axis.dim]:
        return lost(node, given)
    return state._replace(axis=axis)


@rule("aten::repeat_interleave", "aten::index_select", "aten::unfold", "aten::cumsum", "aten::flip")
def along_other(node: Node, given: Given) -> State:
    """Rows are picked, copied or summed along a dimension that is not the feature dimension."""
    bound = arguments(node)
    source = bound.get("self", node.args[0])
    state = given(source)
    dim = bound.get("dim", bound.get("dimension", bound.get("dims")))
    if not isinstance(state, Shift) or len(given.states) > 1 or dim is None:
        return lost(node, given)
    dims = len(shape_of(source))
    touched = [entry % dims for entry in (dim if isinstance(dim, list | tuple) else [dim])]
    return lost(node, given) if state.axis.dim in touched else state


@rule("aten::roll")
def roll(node: Node, given: Given) -> State:
    """Rows change places; along the whole feature axis too a constant stays one."""
    bound = arguments(node)
    state = given(bound["self"])
    if not isinstance(state, Shift) or not bound["dims"]:
        return lost(node, given)
    dims = len(shape_of(node))
    inside = state.axis.dim in {dim % dims for dim in bound["dims"]}
    return lost(node, given) if inside and not state.axis.whole else state


def _cut(state: Shift, size: int, start: int, length: int, step: int = 1) -> Axis | None:
    """The axis after entries [start, start + length) were kept of its dimension."""
    row = state.features * state.axis.inner
    if step == 1 and start % row == 0 and length and length % row == 0:
        return state.axis._replace(outer=length // row)
    return None


@rule("aten::slice", "aten::narrow")
def slice_(node: Node, given: Given) -> State:
    """A range of one dimension."""
    bound = arguments(node)
    source = bound.get("self", bound.get("input"))
    state = given(source)
    if not isinstance(state, Shift):
        return lost(node, given)
    shape = shape_of(source)
    dim = bound["dim"] % len(shape)
    if dim != state.axis.dim:
        return state
    start = bound["start"] or 0
    if not isinstance(start, int) or not isinstance(bound.get("step", 1), int):
        return lost(node, given)
    start = min(max(start + (shape[dim] if start < 0 else 0), 0), shape[dim])
    axis = _cut(state, shape[dim], start, shape_of(node)[dim], bound.get("step", 1))
    return lost(node, given) if axis is None else state._replace(axis=axis)


@rule("aten::select")
def select(node: Node, given: Given) -> State:
    """One entry of one dimension, which goes."""
    bound = arguments(node)
    state = given(bound["self"])
    if not isinstance(state, Shift):
        return lost(node, given)
    dim = bound["dim"] % len(shape_of(bound["self"]))
    if dim == state.axis.dim:
        return lost(node, given)
    return state._replace(axis=state.axis._replace(dim=state.axis.dim - (state.axis.dim > dim)))


@rule("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::tensor_split", "aten::unbind")
def split(node: Node, given: Given) -> Any:
    """Parts along one dimension: a list of states."""
    bound = arguments(node)
    source = bound["self"]
    state = given(source)
    parts = node.meta["val"]
    if not isinstance(state, Shift):
        return [lost(node, given)] * len(parts)
    dims = len(shape_of(source))
    dim = bound["dim"] % dims
    if name_is_unbind(node):
        if dim == state.axis.dim:
            return [lost(node, given)] * len(parts)
        axis = state.axis._replace(dim=state.axis.dim - (state.axis.dim > dim))
        return [state._replace(axis=axis)] * len(parts)
    if dim != state.axis.dim:
        return [state] * len(parts)
    result: list[State] = []
    start = 0
    for part in parts:
        length = part.shape[dim]
        cut = _cut(state, shape_of(source)[dim], start, length)
        result.append(lost(node, given) if cut is None else state._replace(axis=cut))
        start += length
    return result


def name_is_unbind(node: Node) -> bool:
    """Whether parts lose the dimension that they were cut along."""
    return node.target._schema.name == "aten::unbind"  # type: ignore[union-attr]


@rule(
    "aten::cat", "aten::concat", "aten::concatenate", "aten::stack", "aten::hstack", "aten::vstack"
)
def cat(node: Node, given: Given) -> State:
    """Rows of several values beside each other; parts of one row are lost."""
    bound = arguments(node)
    parts = list(bound["tensors"])
    kept = [part for part in parts if shape_of(part) != (0,)]
    name = node.target._schema.name  # type: ignore[union-attr]
    dims = len(shape_of(node))
    dim = bound.get("dim", -1 if name == "aten::hstack" else 0) % dims
    if name in ("aten::hstack", "aten::vstack") and any(len(shape_of(p)) != dims for p in kept):
        return lost(node, given)
    if name == "aten::hstack":
        dim = 0 if dims == 1 else 1

    def lifted(state: State) -> State:
        if not isinstance(state, Shift) or name != "aten::stack":
            return state
        return state._replace(
            axis=state.axis._replace(dim=state.axis.dim + (state.axis.dim >= dim))
        )

    total = combine(node, given, [(part, lifted(given(part))) for part in kept])
    if isinstance(total, Shift) and total.axis.dim == dim and name != "aten::stack":
        return lost(node, given)
    return total


@rule("aten::pad", "aten::constant_pad_nd", "aten::reflection_pad1d", "aten::reflection_pad2d",
      "aten::replication_pad1d", "aten::replication_pad2d")  # fmt: skip
def pad(node: Node, given: Given) -> State:
    """Rows of zeros, or copies of rows, along other dimensions."""
    bound = arguments(node)
    state = given(bound["self"])
    if not isinstance(state, Shift):
        return lost(node, given)
    widths = bound["pad"] if "pad" in bound else bound["padding"]
    dims = len(shape_of(node))
    padded = {dims - 1 - i // 2 for i, width in enumerate(widths) if width != 0}
    if state.axis.dim in padded or state.scale is not None:
        return lost(node, given)
    value = bound.get("value")
    constant = bound.get("mode", "constant") == "constant" and value not in (None, 0)
    return state._replace(centred=state.centred and not constant)
