"""Transfer rules of arithmetic: sums, products, linear maps, norms, softmax."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from effkern.convert.axes import Axis, through_broadcast
from effkern.convert.calls import arguments, constant_along, is_floating, shape_of
from effkern.convert.rules import Given, combine, lost, rule
from effkern.convert.states import MeanOf, One, Shift, State

__all__: list[str] = []


def _broadcast(node: Node, operand: Any, state: State) -> State:
    """A state with its axis in the coordinates of the result that the operand is broadcast to."""
    if not isinstance(state, Shift):
        return state
    dims = len(shape_of(operand))
    return state._replace(axis=through_broadcast(state.axis, dims, len(shape_of(node))))


@rule("aten::add", "aten::sub", "aten::rsub", "aten::subtract", "aten::__radd__", "aten::__rsub__")
def add(node: Node, given: Given) -> State:
    """A sum or difference; x - mean(x) does not see a shift of x."""
    bound = arguments(node)
    first, second = bound["self"], bound["other"]
    mean = given(second)
    if isinstance(mean, MeanOf):
        state = given(first)
        removed = mean.value is first and isinstance(state, Shift) and state.axis == mean.axis
        alike = bound.get("alpha", 1) == 1 and node.target._schema.name == "aten::sub"  # type: ignore[union-attr]
        return None if removed and alike else lost(node, given)
    return combine(node, given, [(x, _broadcast(node, x, given(x))) for x in (first, second)])


@rule("aten::mul", "aten::multiply", "aten::div", "aten::divide", "aten::true_divide")
def mul(node: Node, given: Given) -> State:
    """A product with what is constant along the axis, or with the scale that was folded."""
    bound = arguments(node)
    first, second = bound["self"], bound["other"]
    division = "div" in node.target._schema.name  # type: ignore[union-attr]
    if division and (given(second) is not None or bound.get("rounding_mode")):
        return lost(node, given)
    for value, factor in ((first, second), (second, first)):
        state, scale = _broadcast(node, value, given(value)), given(factor)
        if not isinstance(state, Shift):
            continue
        if isinstance(scale, One):
            if division or scale.scale is not state.scale or not _along(node, factor, state):
                return lost(node, given)
            return state._replace(scale=None, sources=state.sources | scale.sources)
        if scale is None and constant_along(factor, state.axis, len(shape_of(node))):
            return state
    return lost(node, given)


def _along(node: Node, factor: Node, state: Shift) -> bool:
    """Whether a factor has one entry for each feature and is broadcast along everything else."""
    shape = shape_of(factor)
    dim = state.axis.dim - (len(shape_of(node)) - len(shape))
    return (
        state.axis.whole
        and dim >= 0
        and all(size == (state.features if d == dim else 1) for d, size in enumerate(shape))
    )


@rule("aten::linear")
def linear(node: Node, given: Given) -> State:
    """``x W^T + b``: W and b centred along the outputs centre it; else the map acts on x's rows."""
    bound = arguments(node)
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    last = len(shape_of(node)) - 1
    return _affine(node, given, x, (weight, 0), (bias, 0), last, last)


@rule("aten::addmm")
def addmm(node: Node, given: Given) -> State:
    """``b + x W``, W stored by inputs."""
    bound = arguments(node)
    if bound["beta"] != 1 or bound["alpha"] != 1:
        return lost(node, given)
    bias = bound["self"]
    return _affine(
        node, given, bound["mat1"], (bound["mat2"], 1), (bias, len(shape_of(bias)) - 1), 1, 1
    )


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution", "aten::conv_transpose1d",
      "aten::conv_transpose2d", "aten::conv_transpose3d")  # fmt: skip
def convolution(node: Node, given: Given) -> State:
    """A convolution whose output channels are the features."""
    bound = arguments(node)
    name = node.target._schema.name  # type: ignore[union-attr]
    transposed = "transpose" in name or bool(bound.get("transposed"))
    weight = bound["weight"]
    channels = len(shape_of(node)) - (len(shape_of(weight)) - 1)
    if bound["groups"] != 1 or given(bound["input"]) is not None:
        return lost(node, given)
    return _affine(
        node, given, bound["input"], (weight, int(transposed)), (bound["bias"], 0), channels, None
    )


def _affine(
    node: Node,
    given: Given,
    x: Node,
    weight: tuple[Node, int],
    bias: tuple[Any, int],
    output: int,
    contracted: int | None,
) -> State:
    """``W x + b`` along dimension ``output``, for an edited weight and bias or an edited x.

    Args:
        node: the operation.
        given: the states of its operands.
        x: what the weight multiplies.
        weight: with its dimension of outputs.
        bias: with its dimension of outputs; None for none.
        output: the dimension of the result that the outputs lie in.
        contracted: the dimension of x that the weight sums over, where a shift of x along another
            is let through.
    """
    parts: list[tuple[Any, State]] = []
    if given(x) is not None:
        state = given(x)
        if len(given.states) > 1 or not isinstance(state, Shift) or state.axis.dim == contracted:
            return lost(node, given)
        parts.append((x, state))  # the same map for every feature
    elif given(weight[0]) is not None:
        state = given(weight[0])
        if not isinstance(state, Shift) or state.axis.dim != weight[1]:
            return lost(node, given)
        parts.append((weight[0], state._replace(axis=state.axis._replace(dim=output))))
    else:
        parts.append((None, None))
    if isinstance(bias[0], Node):
        state = given(bias[0])
        if state is not None:
            if not isinstance(state, Shift) or state.axis.dim != bias[1]:
                return lost(node, given)
            state = state._replace(axis=state.axis._replace(dim=output))
        parts.append((bias[0], state))
    return combine(node, given, parts)


@rule("aten::matmul", "aten::mm", "aten::bmm", "aten::mv")
def matmul(node: Node, given: Given) -> State:
    """A product of matrices, one of them shifted along a dimension that is not summed over."""
    left, right = node.args[:2]
    a, b = given(left), given(right)
    dims, left_dims, right_dims = (len(shape_of(x)) for x in (node, left, right))
    if min(left_dims, right_dims) < 2 or (a is not None and b is not None):
        return lost(node, given)
    state, operand_dims, summed = (
        (a, left_dims, left_dims - 1) if a is not None else (b, right_dims, right_dims - 2)
    )
    if not isinstance(state, Shift) or state.axis.dim == summed:
        return lost(node, given)
    axis = through_broadcast(state.axis, operand_dims, dims)
    if axis.dim < dims - 2:
        return lost(node, given)  # a batch of matrices, each its own map
    return state._replace(axis=axis)


@rule("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_matmul(node: Node, given: Given) -> State:
    """Each row times the matrix of its group, whose columns are shifted."""
    weight = node.args[1]
    state = given(weight)
    if not isinstance(state, Shift) or len(given.states) > 1 or len(node.all_input_nodes) != 3:
        return lost(node, given)  # a fourth operand is a bias
    if (len(shape_of(node)), len(shape_of(weight)), state.axis.dim) != (2, 3, 2):
        return lost(node, given)
    return state._replace(axis=state.axis._replace(dim=1))


@rule("aten::einsum")
def einsum(node: Node, given: Given) -> State:
    """A product in which one operand alone has the feature axis, and the result keeps it."""
    bound = arguments(node)
    left, arrow, right = bound["equation"].replace(" ", "").partition("->")
    letters = left.split(",")
    operands = bound["tensors"]
    if len(given.states) > 1 or not arrow or "." in left or len(letters) != len(operands):
        return lost(node, given)
    places = [i for i, operand in enumerate(operands) if given(operand) is not None]
    state = given(operands[places[0]])
    if len(places) > 1 or not isinstance(state, Shift):
        return lost(node, given)
    letter = letters[places[0]][state.axis.dim]
    if left.count(letter) != 1 or right.count(letter) != 1:
        return lost(node, given)
    return state._replace(axis=state.axis._replace(dim=right.index(letter)))


@rule("aten::mean", "aten::sum", "aten::nanmean")
def mean(node: Node, given: Given) -> State:
    """A mean or sum over other dimensions; the mean over the feature axis itself is remembered."""
    bound = arguments(node)
    source = bound["self"]
    state = given(source)
    if not isinstance(state, Shift) or not bound.get("dim") or not is_floating(node):
        return lost(node, given)
    dims = len(shape_of(source))
    gone = {dim % dims for dim in bound["dim"]}
    if state.axis.dim in gone:
        mean_alone = node.target._schema.name == "aten::mean" and gone == {state.axis.dim}  # type: ignore[union-attr]
        if mean_alone and bound["keepdim"] and state.axis.whole and state.scale is None:
            return MeanOf(source, state.axis, state.sources)
        return lost(node, given)
    if bound["keepdim"]:
        return state
    before = sum(dim < state.axis.dim for dim in gone)
    return state._replace(axis=state.axis._replace(dim=state.axis.dim - before))


@rule("aten::var", "aten::std")
def variance(node: Node, given: Given) -> State:
    """A variance along the feature axis does not see a shift."""
    bound = arguments(node)
    state = given(bound["self"])
    dims = len(shape_of(bound["self"]))
    if (
        isinstance(state, Shift)
        and state.scale is None
        and state.axis.whole
        and isinstance(bound.get("dim"), list | tuple)
        and {dim % dims for dim in bound["dim"]} == {state.axis.dim}
    ):
        return None
    return lost(node, given)


@rule("aten::var_mean")
def variance_and_mean(node: Node, given: Given) -> list[State]:
    """As the variance and the mean by themselves."""
    state = given(arguments(node)["self"])
    spread = variance(node, given)
    if spread is not None or not isinstance(state, Shift) or not arguments(node)["keepdim"]:
        return [spread, lost(node, given)]
    return [None, MeanOf(arguments(node)["self"], state.axis, state.sources)]


@rule("aten::avg_pool1d", "aten::avg_pool2d", "aten::adaptive_avg_pool1d",
      "aten::adaptive_avg_pool2d", "aten::upsample_bilinear2d", "aten::upsample_bicubic2d",
      "aten::upsample_nearest1d", "aten::upsample_nearest2d", "aten::upsample_linear1d",
      "aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa")  # fmt: skip
def resample(node: Node, given: Given) -> State:
    """Linear in each channel, and the same map for all."""
    source = node.args[0]
    state = given(source)
    spatial = 1 if "1d" in node.target._schema.name else 2  # type: ignore[union-attr]
    if not isinstance(state, Shift) or state.axis.dim >= len(shape_of(source)) - spatial:
        return lost(node, given)
    return state


@rule("aten::layer_norm", "aten::native_layer_norm")
def layer_norm(node: Node, given: Given) -> Any:
    """A layer norm over the feature axis does not see a shift."""
    bound = arguments(node)
    state = given(bound["input"])
    several = node.target._schema.name == "aten::native_layer_norm"  # type: ignore[union-attr]
    last = Axis(len(shape_of(bound["input"])) - 1)
    if (
        isinstance(state, Shift)
        and state.scale is None
        and len(given.states) == 1
        and state.axis == last
        and len(bound["normalized_shape"]) == 1
    ):
        return [None, lost(node, given), None] if several else None
    return [lost(node, given)] * 3 if several else lost(node, given)


@rule("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax")
def softmax(node: Node, given: Given) -> State:
    """A softmax over the feature axis does not see a shift."""
    bound = arguments(node)
    state = given(bound["self"])
    dims = len(shape_of(node))
    if (
        isinstance(state, Shift)
        and state.scale is None
        and state.axis.whole
        and bound["dim"] % dims == state.axis.dim
    ):
        return None
    return lost(node, given)
