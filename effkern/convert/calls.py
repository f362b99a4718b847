"""Reading a traced graph: an operation's arguments by name, shapes, what is plainly constant."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from effkern.convert.axes import Axis

__all__ = ["arguments", "constant_along", "is_zero", "name_of", "shape_of", "tensors_of"]


def name_of(node: Node) -> str:
    """The operation's name without overload, such as ``aten::add``; of other nodes the op code."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return node.op


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call of an operator by its schema's names, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound = dict(node.kwargs)
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name not in bound:
            bound[argument.name] = argument.default_value
    return bound


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of the tensor that a node stands for; empty for what is none."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_floating(node: Node) -> bool:
    """Whether a node stands for a tensor of floating point numbers."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def tensors_of(node: Node) -> list[Node]:
    """The operands of a node, each once."""
    return list(node.all_input_nodes)


_SAME_SHAPE = {
    "aten::clone", "aten::contiguous", "aten::detach", "aten::alias", "aten::to", "aten::_to_copy",
    "aten::type_as", "aten::logical_not", "aten::bitwise_not", "aten::eq", "aten::ne", "aten::lt",
    "aten::gt", "aten::le", "aten::ge", "aten::__and__", "aten::__or__", "aten::bitwise_and",
    "aten::bitwise_or", "aten::logical_and", "aten::logical_or", "aten::mul", "aten::add",
    "aten::sub", "aten::div", "aten::neg", "aten::tanh", "aten::sigmoid", "aten::where",
    "aten::sqrt", "aten::rsqrt", "aten::pow", "aten::exp", "effkern_trace::mark",
}  # fmt: skip

_CONSTANT = {
    "aten::zeros", "aten::zeros_like", "aten::new_zeros", "aten::ones", "aten::ones_like",
    "aten::new_ones", "aten::full", "aten::full_like", "aten::new_full", "aten::scalar_tensor",
}  # fmt: skip


def constant_along(node: Any, axis: Axis, dims: int) -> bool:
    """Whether a value does not vary along an axis of a tensor of ``dims`` dimensions that it is
    broadcast to. False where that is not plain.
    """  # fmt: skip
    if not isinstance(node, Node):
        return True
    shape = shape_of(node)
    dim = axis.dim - (dims - len(shape))
    if dim < 0 or shape[dim] == 1:
        return True
    name = name_of(node)
    if name in _CONSTANT:
        return True
    here = axis._replace(dim=dim)
    if name in _SAME_SHAPE:
        return all(constant_along(operand, here, len(shape)) for operand in tensors_of(node))
    if name in ("aten::expand", "aten::expand_as", "aten::broadcast_to"):
        return constant_along(node.args[0], here, len(shape))
    if name == "aten::unsqueeze":
        new = arguments(node)["dim"] % len(shape)
        kept = here._replace(dim=dim - (dim > new))
        return constant_along(node.args[0], kept, len(shape) - 1)
    return False


_KEEPS_ZEROS = {
    "aten::clone", "aten::contiguous", "aten::detach", "aten::alias", "aten::to", "aten::_to_copy",
    "aten::expand", "aten::view", "aten::reshape", "aten::unsqueeze", "aten::squeeze",
    "aten::slice", "aten::select", "aten::permute", "aten::transpose", "effkern_trace::mark",
}  # fmt: skip


def is_zero(node: Any) -> bool:
    """Whether a value is plainly zero everywhere."""
    if not isinstance(node, Node):
        return isinstance(node, int | float) and node == 0
    name = name_of(node)
    if name in ("aten::zeros", "aten::zeros_like", "aten::new_zeros"):
        return True
    if name in ("aten::full", "aten::full_like", "aten::new_full"):
        return arguments(node)["fill_value"] == 0
    if name in ("aten::mul", "aten::div"):
        return is_zero(node.args[0]) and isinstance(node.args[1], int | float)
    if name in _KEEPS_ZEROS:
        return is_zero(node.args[0])
    return False
