"""Every transfer rule against numbers: what it says of an edited operand holds for the result.

For each operation, each operand and each axis that the operand may have, the operand is centred or
shifted, alone or together with the others, and the operation is run on both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from effkern.convert import plan, weights  # noqa: F401 (plan fills the table of rules)
from effkern.convert.axes import Axis, candidates, through_view
from effkern.convert.calls import name_of
from effkern.convert.dropped import transfer_dropped
from effkern.convert.rules import _RULES, transfer
from effkern.convert.states import Lost, Shift, State
from effkern.convert.trace import in_elementary_operations

D = 4
ROW = torch.tensor([2, 0, 1])
MASK = torch.tensor([True, False, True])


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


#: name: the operation, its operands, whether some operand can be centred and the result be so
OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], bool]] = {
    "add": (lambda x, y: x + y, (r(3, D), r(2, 3, D)), True),
    "add twice": (lambda x: x + x, (r(3, D),), True),
    "add zeros": (lambda x: x + torch.zeros(3, D, dtype=x.dtype), (r(3, D),), True),
    "add scaled zeros": (lambda x: torch.zeros_like(x) * 0.5 + x, (r(3, D),), True),
    "add alpha": (lambda x, y: torch.add(x, y, alpha=3), (r(3, D), r(3, D)), True),
    "sub": (lambda x, y: x - y, (r(3, D), r(D)), True),
    "rsub": (lambda x: 1 - x, (r(3, D),), False),
    "mul rows": (lambda x, y: x * y, (r(3, D), r(3, 1)), True),
    "mul features": (lambda x, y: x * y, (r(3, D), r(D)), False),
    "mul number": (lambda x: x * 3, (r(3, D),), True),
    "mul itself": (lambda x: x * x, (r(3, D),), False),
    "mul expanded": (lambda x, y: x * y[:, None].expand(3, D), (r(3, D), r(3)), True),
    "div rows": (lambda x, y: x / y, (r(3, D), r(3, 1)), True),
    "div by it": (lambda x: 1 / x, (r(3, D),), False),
    "addcmul": (lambda x, y: torch.addcmul(x, y, 2 * torch.ones(3, 1, dtype=x.dtype), value=0.5),
                (r(3, D), r(3, D)), True),
    "addcmul features": (torch.addcmul, (r(3, D), r(3, D), r(D)), False),
    "addcdiv": (lambda x, y: torch.addcdiv(x, y, 2 * torch.ones(3, 1, dtype=x.dtype), value=0.5),
                (r(3, D), r(3, D)), True),
    "addcdiv by it": (lambda x: torch.addcdiv(x, x, x), (r(3, D),), False),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3), (r(3, D), r(3, D)), True),
    "lerp rows": (torch.lerp, (r(3, D), r(3, D), r(3, 1)), True),
    "lerp features": (torch.lerp, (r(3, D), r(3, D), r(D)), False),
    "neg": (lambda x: -x, (r(3, D),), True),
    "to float": (lambda x: x.float().double(), (r(3, D),), True),
    "to int": (lambda x: x.to(torch.int64), (r(3, D),), False),
    "relu": (torch.relu, (r(3, D),), False),
    "dropout": (lambda x: F.dropout(x, 0.5, False), (r(3, D),), True),
    "view split": (lambda x: x.view(3, 2, D), (r(3, 2 * D),), True),
    "view merge": (lambda x: x.reshape(3, 2 * D), (r(3, 2, D),), True),
    "view cut": (lambda x: x.view(3, 2, 2), (r(3, D),), False),
    "view across": (lambda x: x.reshape(3, D), (r(D, 3),), False),
    "flatten": (lambda x: x.flatten(2).transpose(1, 2), (r(2, D, 3, 3),), True),
    "unsqueeze": (lambda x: x.unsqueeze(1).squeeze(1), (r(3, D),), True),
    "permute": (lambda x: x.permute(2, 0, 1), (r(2, 3, D),), True),
    "transpose": (lambda x: x.transpose(-1, 0), (r(2, 3, D),), True),
    "t": (lambda x: x.t(), (r(3, D),), True),
    "movedim": (lambda x: x.movedim(2, 0), (r(2, 3, D),), True),
    "expand": (lambda x: x.expand(2, 3, D), (r(1, 3, D),), True),
    "repeat": (lambda x: x.repeat(2, 2, 1), (r(3, D),), True),
    "repeat features": (lambda x: x.repeat(1, 2), (r(3, D),), False),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), (r(3, D),), True),
    "slice": (lambda x: x[:, 1:], (r(2, 3, D),), True),
    "slice features": (lambda x: x[:, 1:], (r(3, D),), False),
    "slice chunk": (lambda x: x[:, D : 2 * D], (r(3, 3 * D),), True),
    "slice chunks": (lambda x: x[:, -2 * D :], (r(3, 3 * D),), True),
    "slice step": (lambda x: x[:, ::2], (r(3, 2 * D),), False),
    "select": (lambda x: x[:, 0], (r(2, 3, D),), True),
    "select feature": (lambda x: x[..., 0], (r(3, D),), False),
    "chunk": (lambda x: x.chunk(3, -1)[1], (r(2, 3 * D),), True),
    "split": (lambda x: x.split([1, 2], 0)[1], (r(3, D),), True),
    "unbind": (lambda x: x.unbind(1)[2], (r(2, 3, D),), True),
    "cat": (lambda x, y: torch.cat([x, y], 0), (r(3, D), r(2, D)), True),
    "cat features": (lambda x, y: torch.cat([x, y], 1), (r(3, D), r(3, D)), False),
    "cat one": (lambda x: torch.cat([x, torch.ones(1, D, dtype=x.dtype)], 0), (r(3, D),), False),
    "stack": (lambda x, y: torch.stack([x, y], 1), (r(3, D), r(3, D)), True),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 2)), (r(3, D),), True),
    "pad ones": (lambda x: F.pad(x, (0, 0, 1, 2), value=1.0), (r(3, D),), False),
    "pad features": (lambda x: F.pad(x, (1, 0)), (r(3, D),), False),
    "roll": (lambda x: x.roll((1, 2), (0, 1)), (r(3, 5, D),), True),
    "roll features": (lambda x: x.roll(1, -1), (r(3, D),), True),
    "roll chunks": (lambda x: x.roll(1, -1), (r(3, 2 * D),), False),
    "flip": (lambda x: x.flip(0), (r(3, D),), True),
    "cumsum": (lambda x: x.cumsum(0), (r(3, D),), True),
    "cumsum features": (lambda x: x.cumsum(1), (r(3, D),), False),
    "embedding": (lambda w: F.embedding(ROW, w), (r(5, D),), True),
    "index rows": (lambda x: x[ROW], (r(3, D),), True),
    "index middle": (lambda x: x[:, ROW], (r(2, 3, D),), True),
    "index pairs": (lambda x: x[ROW, ROW], (r(3, 3, D),), True),
    "index apart": (lambda x: x[ROW, :, ROW], (r(3, D, 3),), True),
    "index features": (lambda x: x[:, ROW], (r(3, D),), False),
    "index_select": (lambda x: x.index_select(0, ROW), (r(3, D),), True),
    "index_put": (lambda x, y: x.index_put((ROW,), y), (r(3, D), r(3, D)), True),
    "index_put zeros": (lambda y: torch.zeros(3, D, dtype=y.dtype).index_put((ROW,), y, True),
                        (r(3, D),), True),
    "gather": (lambda x: x.gather(0, ROW[:, None].expand(3, D)), (r(3, D),), True),
    "gather each": (lambda x: x.gather(0, torch.tensor([[0, 1, 2, 0]])), (r(3, D),), False),
    "scatter": (lambda x, y: x.scatter(0, ROW[:, None].expand(3, D), y), (r(3, D), r(3, D)), True),
    "index_add": (lambda x, y: x.index_add(0, ROW, y), (r(3, D), r(3, D)), True),
    "slice_scatter": (lambda x, y: x.slice_scatter(y, 0, 1), (r(3, D), r(2, D)), True),
    "select_scatter": (lambda x, y: x.select_scatter(y, 0, 1), (r(3, D), r(D)), True),
    "masked_scatter": (lambda x, y: x.masked_scatter(MASK[:, None], y), (r(3, D), r(2, D)), True),
    "where": (lambda x, y: torch.where(MASK[:, None], x, y), (r(3, D), r(3, D)), True),
    "where each": (lambda x, y: torch.where(torch.eye(3, D) > 0, x, y), (r(3, D), r(3, D)), False),
    "masked_fill": (lambda x: x.masked_fill(MASK[:, None], 0.0), (r(3, D),), True),
    "masked_fill one": (lambda x: x.masked_fill(MASK[:, None], 1.0), (r(3, D),), False),
    "masked_fill each": (lambda x: x.masked_fill(torch.eye(3, D) > 0, 0.0), (r(3, D),), False),
    "linear": (F.linear, (r(2, 3, 5), r(D, 5), r(D)), True),
    "linear without bias": (F.linear, (r(3, 5), r(D, 5)), True),
    "linear chunks": (F.linear, (r(3, 5), r(2 * D, 5), r(2 * D)), True),
    "linear over tokens": (F.linear, (r(2, D, 3), r(5, 3)), True),
    "linear over tokens with bias": (F.linear, (r(2, D, 3), r(5, 3), r(5)), False),
    "linear reads": (lambda x: F.linear(x, torch.ones(3, D, dtype=x.dtype)), (r(3, D),), False),
    "addmm": (torch.addmm, (r(D), r(3, 5), r(5, D)), True),
    "addmm scaled": (lambda b, x, y: torch.addmm(b, x, y, beta=2, alpha=3),
                     (r(3, D), r(3, 5), r(5, D)), True),
    "baddbmm": (lambda b, x, y: torch.baddbmm(b, x, y, alpha=3),
                (r(2, 3, D), r(2, 3, 5), r(2, 5, D)), True),
    "matmul": (lambda x, y: x @ y, (r(2, 3, 5), r(5, D)), True),
    "matmul rows": (lambda x, y: x @ y, (r(2, D, 3), r(3, 5)), True),
    "matmul batch": (lambda x, y: x @ y, (r(D, 3, 3), r(3, 5)), False),
    "bmm": (torch.bmm, (r(2, 3, 3), r(2, 3, D)), True),
    "einsum": (lambda x, w: torch.einsum("bth,hd->bdt", x, w), (r(2, 3, 5), r(5, D)), True),
    "einsum over features": (lambda x, w: torch.einsum("td,dh->th", x, w), (r(3, D), r(D, 5)),
                             False),
    "einsum each": (lambda x, y: torch.einsum("td,td->td", x, y), (r(3, D), r(3, D)), False),
    "conv1d": (F.conv1d, (r(2, 3, 6), r(D, 3, 2), r(D)), True),
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2), (r(2, 3, 4, 4), r(D, 3, 2, 2)), True),
    "conv2d groups": (lambda x, w: F.conv2d(x, w, groups=2), (r(2, 6, 4, 4), r(D, 3, 2, 2)), False),
    "conv2d unbatched": (F.conv2d, (r(3, 4, 4), r(D, 3, 2, 2), r(D)), True),
    "conv_transpose2d": (F.conv_transpose2d, (r(2, 3, 4, 4), r(3, D, 2, 2), r(D)), True),
    "conv2d reads": (lambda x: F.conv2d(x, torch.ones(2, D, 2, 2, dtype=x.dtype)),
                     (r(2, D, 4, 4),), False),
    "mean": (lambda x: x.mean(1), (r(2, 3, D),), True),
    "mean keeps": (lambda x: x.mean((0, 1), keepdim=True), (r(2, 3, D),), True),
    "mean features": (lambda x: x.mean(-1), (r(3, D),), False),
    "minus mean": (lambda x: x - x.mean(-1, keepdim=True), (r(3, D),), False),
    "minus twice its mean": (lambda x: torch.sub(x, x.mean(-1, keepdim=True), alpha=2),
                             (r(3, D),), False),
    "minus another mean": (lambda x: x - x.mean(0, keepdim=True), (r(3, D),), True),
    "sum": (lambda x: x.sum(0), (r(3, D),), True),
    "max": (lambda x: x.amax(0), (r(3, D),), False),
    "var": (lambda x: x.var(-1), (r(3, D),), False),
    "var rows": (lambda x: x.var(0), (r(3, D),), False),
    "var_mean": (lambda x: x - torch.var_mean(x, -1, keepdim=True)[1], (r(3, D),), False),
    "var_mean of rows": (lambda x: torch.var_mean(x, 0, keepdim=True)[1], (r(3, D),), False),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (r(2, D, 4, 4),), True),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), (r(2, D, 4, 4),), True),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (r(2, D, 4, 4),), False),
    "interpolate": (lambda x: F.interpolate(x, size=(6, 6), mode="bicubic"),
                    (r(1, D, 3, 3),), True),
    "pool features": (lambda x: F.avg_pool1d(x, 2), (r(2, 3, D),), False),
    "layer_norm": (lambda x: F.layer_norm(x, (D,)), (r(3, D),), False),
    "layer_norm of both": (lambda x: F.layer_norm(x, (3, D)), (r(2, 3, D),), False),
    "layer_norm merged": (lambda x: F.layer_norm(x, (2 * D,)), (r(3, 2 * D),), False),
    "group_norm": (lambda x: F.group_norm(x, 1), (r(2, D, 3),), False),
    "group_norm of rows": (lambda x: F.group_norm(x, 1), (r(3, D),), False),
    "softmax": (lambda x: x.softmax(-1), (r(3, D),), False),
    "softmax rows": (lambda x: x.softmax(0), (r(3, D),), False),
    "zeros_like": (torch.zeros_like, (r(3, D),), False),
    "square root": (lambda x: x.abs().sqrt(), (r(3, D),), False),
}  # fmt: skip


#: Operations that are several in one, which a trace takes apart.
COMPOUND = [name for name in OPERATIONS if name.startswith(("addc", "lerp", "addmm s", "baddbmm"))]
COMPOUND.append("group_norm of rows")


class Everything(nn.Module):
    """Many operations in one call, since tracing is what takes the time."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.functions = [OPERATIONS[name][0] for name in names]

    def forward(self, operands: list[list[Tensor]]) -> list[Any]:
        return [f(*own) for f, own in zip(self.functions, operands, strict=True)]


class Traced(NamedTuple):
    """The graph of one operation."""

    holders: list[Node]
    nodes: list[Node]
    result: Node


@pytest.fixture(scope="module")
def traced() -> dict[str, Traced]:
    simple = [name for name in OPERATIONS if name not in COMPOUND]
    return graphs_of(simple) | graphs_of(COMPOUND)


def graphs_of(names: list[str]) -> dict[str, Traced]:
    """The operations of these names, taken from one trace."""
    operands = [list(OPERATIONS[name][1]) for name in names]
    program = torch.export.export(Everything(names), (operands,), strict=False)
    if names is COMPOUND:
        program = in_elementary_operations(program)
    graph = program.graph
    holders = iter(
        node
        for node in graph.nodes
        if node.op == "placeholder" and node.name.startswith("operands")
    )
    (output,) = (node for node in graph.nodes if node.op == "output")
    found = {}
    for name, own, result in zip(names, operands, output.args[0], strict=True):
        needed = {result}
        for node in reversed(graph.nodes):
            if node in needed:
                needed |= set(node.all_input_nodes)
        found[name] = Traced(
            [next(holders) for _ in own], [node for node in graph.nodes if node in needed], result
        )
    return found


def walk(traced: Traced, given: list[State], drop: bool = False) -> State:
    """The state of an operation's result, for states of its operands."""
    states: dict[Node, Any] = {}
    rule_of = transfer_dropped if drop else transfer
    for node in traced.nodes:
        if node.op == "placeholder":
            states[node] = given[traced.holders.index(node)] if node in traced.holders else None
        elif node.op == "call_function":
            states[node] = rule_of(node, states)
        else:
            states[node] = None
    return states[traced.result]


def shifted(value: Tensor, axis: Axis) -> Tensor:
    parts = weights.split(value, axis, D)
    return (parts + torch.randn_like(parts.narrow(axis.dim + 1, 0, 1))).reshape(value.shape)


@pytest.mark.parametrize("name", OPERATIONS)
def test_rule(name: str, traced: dict[str, Traced]) -> None:
    function, operands, can_be_centred = OPERATIONS[name]
    original = function(*operands)
    centred_once = False
    options = [[None, *candidates(tuple(x.shape), D)] for x in operands]
    for axes in itertools.product(*options):
        for keep in itertools.product([True, False], repeat=len(operands)):
            if any(not k and axis is None for k, axis in zip(keep, axes, strict=True)):
                continue
            given: list[State] = []
            edited = []
            for i, (x, axis, centre) in enumerate(zip(operands, axes, keep, strict=True)):
                given.append(None if axis is None else Shift(axis, D, centre, None, 1 << i))
                if axis is not None:
                    x = weights.centred(x, axis, D) if centre else shifted(x, axis)
                edited.append(x)
            state = walk(traced[name], given)
            result = function(*edited)
            if state is None:
                torch.testing.assert_close(result, original)
            elif isinstance(state, Shift):
                assert state.features == D
                difference = weights.split(result - original, state.axis, D)
                mean = difference.mean(state.axis.dim + 1, keepdim=True).expand_as(difference)
                tight = {"rtol": 0, "atol": 1e-6 if name == "to float" else 1e-12}
                torch.testing.assert_close(difference, mean, **tight)
                if state.centred:
                    of_result = weights.mean_along(result, state.axis, D)
                    torch.testing.assert_close(of_result, torch.zeros_like(of_result), **tight)
                    centred_once = True
            else:
                assert isinstance(state, Lost)
    assert centred_once == can_be_centred


def without_last(value: Tensor, axis: Axis) -> Tensor:
    """Centred, with zero in place of the last feature."""
    parts = weights.split(weights.centred(value, axis, D), axis, D).clone()
    parts.select(axis.dim + 1, D - 1).zero_()
    return parts.reshape(value.shape)


@pytest.mark.parametrize("name", OPERATIONS)
def test_rule_without_the_last_feature(name: str, traced: dict[str, Traced]) -> None:
    """What is known of operands that were centred and lost their last feature, not only shifted."""
    function, operands, _ = OPERATIONS[name]
    original = function(*operands)
    options = [[None, *candidates(tuple(x.shape), D)] for x in operands]
    for axes in itertools.product(*options):
        pairs = list(zip(operands, axes, strict=True))
        given: list[State] = [
            None if axis is None else Shift(axis, D, True, None, 1 << i)
            for i, axis in enumerate(axes)
        ]
        state = walk(traced[name], given, drop=True)
        if state is None:
            assert not any(axes) or name == "zeros_like", "it has read nothing that was edited"
        elif isinstance(state, Shift):
            assert state.centred
            result = function(*[x if a is None else without_last(x, a) for x, a in pairs])
            tight = {"rtol": 0, "atol": 1e-6 if name == "to float" else 1e-12}
            torch.testing.assert_close(result, without_last(original, state.axis), **tight)
        else:
            assert isinstance(state, Lost)


def test_every_rule_is_tried(traced: dict[str, Traced]) -> None:
    names = {name_of(node) for each in traced.values() for node in each.nodes}
    tried = {_RULES[name] for name in names if name in _RULES}
    assert {rule.__name__ for rule in set(_RULES.values()) - tried} <= {"copy", "grouped_matmul"}


@pytest.mark.parametrize("shape", [(6, D), (2, 3, D), (2, 3 * D), (D, 6), (2, D, 3), (6 * D,)])
def test_views_against_labels(shape: tuple[int, ...]) -> None:
    """A view moves the axis as it moves the feature numbers that are written into a tensor."""
    for axis in candidates(shape, D):
        whole = torch.zeros(shape, dtype=torch.int64)
        feature = weights.split(whole, axis, D) + torch.arange(D).view(
            *[1] * (axis.dim + 1), D, *[1] * (len(shape) - axis.dim)
        )
        rest = torch.arange(whole.numel() // D)
        parts = weights.split(whole, axis, D)
        other = rest.view(parts.narrow(axis.dim + 1, 0, 1).shape).expand_as(parts)
        for new in [(6, D), (2, 3, D), (2, 3 * D), (D, 6), (2, D, 3), (6 * D,), (1, 6, 1, D, 1)]:
            found = through_view(axis, D, shape, new)
            labels, rows = feature.reshape(new), other.reshape(new)
            fits = [tried for tried in candidates(new, D) if _reads(labels, rows, tried)]
            assert [found] if found else not fits
            assert found is None or found in fits


def _reads(labels: Tensor, rows: Tensor, axis: Axis) -> bool:
    """Whether along an axis the features count up and the row stays the same."""
    parts, same = weights.split(labels, axis, D), weights.split(rows, axis, D)
    along = axis.dim + 1
    counting = torch.arange(D).view(*[1] * along, D, *[1] * (parts.dim() - along - 1))
    return bool((parts == counting).all()) and bool((same == same.narrow(along, 0, 1)).all())
