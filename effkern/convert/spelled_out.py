"""Layer norms that a module spells out in elementary operations, without calling layer_norm."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Node

from effkern.convert.calls import arguments, name_of, shape_of
from effkern.convert.trace import Trace

__all__ = ["SpelledOut", "is_row", "match"]

_CASTS = ("aten::to", "aten::_to_copy", "aten::type_as")
_VIEWS = ("aten::view", "aten::reshape", "aten::unsqueeze", "aten::expand")


class SpelledOut(NamedTuple):
    """A layer norm over the last dimension, found in the operations of one call of a module."""

    value: Node
    eps: float
    weight: Node | None
    bias: Node | None
    nodes: set[Node]  # the operations that it is made of


def match(trace: Trace, result: Node) -> SpelledOut | None:
    """Read ``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias`` in a graph, the
    variance also as ``mean(x^2) - mean(x)^2``.

    Args:
        trace: of the model.
        result: what the module's call gives.
    """
    return _Matcher(trace).read(result)


def is_row(node: Node, features: int) -> bool:
    """Whether a tensor has one entry for each feature, in its last dimension."""
    *ones, last = shape_of(node) or (0,)
    return last == features and all(size == 1 for size in ones)


class _Matcher:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.nodes: set[Node] = set()

    def read(self, result: Node) -> SpelledOut | None:
        bias, node = self._parameter_of("aten::add", result)
        weight, node = self._parameter_of("aten::mul", node)
        centred, variance = self._quotient(node)
        if weight is None:
            weight, centred = self._parameter_of("aten::mul", centred)
            centred = self._plain(centred)
        if centred is None or variance is None:
            return None
        eps, mean_square = self._sum_with_number(variance)
        value = self._centred(centred)
        if eps is None or value is None or not self._is_variance(mean_square, centred, value):
            return None
        return SpelledOut(value, eps, weight, bias, self.nodes)

    def _plain(self, node: Any) -> Any:
        """A value without the casts around it."""
        while isinstance(node, Node) and name_of(node) in _CASTS:
            self.nodes.add(node)
            node = node.args[0]
        return node

    def _binary(self, name: str, node: Any) -> tuple[Any, Any] | None:
        node = self._plain(node)
        if isinstance(node, Node) and name_of(node) == name and len(node.args) >= 2:
            if arguments(node).get("alpha", 1) != 1:
                return None
            self.nodes.add(node)
            return node.args[0], node.args[1]
        return None

    def _parameter_of(self, name: str, node: Any) -> tuple[Node | None, Any]:
        """The parameter that a product or sum has as one operand, and the other operand."""
        node = self._plain(node)
        if (
            isinstance(node, Node)
            and name_of(node) == name
            and arguments(node).get("alpha", 1) == 1
        ):
            pair = node.args[0], node.args[1]
            for own, rest in (pair, pair[::-1]):
                parameter, views = self._row(own)
                if parameter is not None and shape_of(rest) == shape_of(node):
                    self.nodes |= {node, *views}
                    return parameter, rest
        return None, node

    def _row(self, node: Any) -> tuple[Node | None, list[Node]]:
        """The parameter of one entry a feature that a value is, and the casts and views around."""
        around: list[Node] = []
        width = shape_of(node)[-1:]
        while isinstance(node, Node) and name_of(node) in _CASTS + _VIEWS:
            around.append(node)
            node = node.args[0]
        if node in self.trace.parameters and width and is_row(node, width[0]):
            return node, around
        return None, []

    def _quotient(self, node: Any) -> tuple[Any, Any]:
        """A and b of ``a * rsqrt(b)`` or ``a / sqrt(b)``."""
        product = self._binary("aten::mul", node)
        for own, root in (product, product[::-1]) if product else ():
            inner = self._power("aten::rsqrt", -0.5, root)
            if inner is not None:
                return self._plain(own), inner
        division = self._binary("aten::div", node)
        if division is not None:
            return self._plain(division[0]), self._power("aten::sqrt", 0.5, division[1])
        return None, None

    def _power(self, name: str, exponent: float, node: Any) -> Any:
        """X of ``x ** exponent``, which has a name of its own."""
        node = self._plain(node)
        if name == "aten::rsqrt" and isinstance(node, Node) and name_of(node) == "aten::reciprocal":
            self.nodes.add(node)
            return self._power("aten::sqrt", 0.5, node.args[0])
        if isinstance(node, Node) and (
            name_of(node) == name or (name_of(node) == "aten::pow" and node.args[1] == exponent)
        ):
            self.nodes.add(node)
            return node.args[0]
        return None

    def _sum_with_number(self, node: Any) -> tuple[float | None, Any]:
        pair = self._binary("aten::add", node)
        if pair is not None and isinstance(pair[1], float | int):
            return float(pair[1]), pair[0]
        return None, None

    def _mean(self, node: Any) -> Any:
        """X of ``x.mean(-1, keepdim=True)``, or of the sum over as many entries as there are."""
        division = self._binary("aten::div", node)
        if division is None:
            return self._reduced("aten::mean", 1, node)
        summed = self._reduced("aten::sum", 1, division[0])
        return summed if division[1] == (shape_of(summed) or (0,))[-1] else None

    def _reduced(self, name: str, index: int, node: Any) -> Any:
        """X of a mean or a population variance of x along its last dimension, which is kept.

        Args:
            name: of the operation.
            index: which result of ``var_mean`` is as good.
            node: the mean or the variance.
        """
        node = self._plain(node)
        found = {node}
        if isinstance(node, Node) and name_of(node) == "getitem" and node.args[1] == index:
            node, name = node.args[0], "aten::var_mean"
            found.add(node)
        if not isinstance(node, Node) or name_of(node) != name:
            return None
        bound = arguments(node)
        dims = bound.get("dim")
        last = len(shape_of(bound["self"])) - 1
        if not dims or [dim % (last + 1) for dim in dims] != [last] or not bound["keepdim"]:
            return None
        if "var" in name and bound.get("correction", bound.get("unbiased")) not in (
            0,
            False,
        ):
            return None  # None is one
        self.nodes |= found
        return bound["self"]

    def _centred(self, node: Any) -> Node | None:
        """X of ``x - mean(x)``."""
        pair = self._binary("aten::sub", node)
        if pair is None or self._plain(self._mean(pair[1])) is not self._plain(pair[0]):
            return None
        return pair[0]

    def _is_variance(self, node: Any, centred: Node, value: Node) -> bool:
        whole = self._plain(self._reduced("aten::var", 0, node))
        if whole is not None:
            return whole is centred or whole is self._plain(value)
        difference = self._binary("aten::sub", node)
        if difference is not None:
            of_squares, of_mean = (self._mean(difference[0]), self._square(difference[1]))
            read = self._square(of_squares), self._mean(of_mean)
            return all(self._plain(x) is self._plain(value) for x in read)
        base = self._square(self._mean(node))
        if base is None:
            return False
        if base is centred:
            return True
        again = self._centred(base)
        return again is not None and self._plain(again) is self._plain(value)

    def _square(self, node: Any) -> Any:
        """X of ``x^2``."""
        node = self._plain(node)
        if not isinstance(node, Node):
            return None
        power = name_of(node) == "aten::pow" and node.args[1] == 2
        product = name_of(node) == "aten::mul" and node.args[0] is node.args[1]
        if not (power or product or name_of(node) == "aten::square"):
            return None
        self.nodes.add(node)
        return self._plain(node.args[0])
