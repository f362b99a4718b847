"""The graph of a model's forward pass, with marks where a module's call begins and ends.

The graph is `torch.export`'s, functional and not decomposed. Parameters are fake in it: tracing
takes no memory for them.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.fx import Graph, Node

from effkern.convert.calls import name_of
from effkern.convert.flatten import named_tensors
from effkern.convert.report import NotConvertible

__all__ = ["Site", "Trace", "is_mark", "left_as_found", "place", "positional_names", "trace"]

_library = torch.library.Library("effkern_trace", "DEF")
_library.define("mark(Tensor value, int site) -> Tensor")
_library.impl("mark", lambda value, site: value.clone(), "CompositeExplicitAutograd")


@dataclass(frozen=True)
class Site:
    """A value that a module's call takes or gives, where it can be recentred at run time.

    ``path`` leads from the arguments (first an argument's name) or from the result to the tensor.
    """

    module: str
    where: str  # "input" or "output"
    path: tuple[str | int, ...]

    def __str__(self) -> str:
        return ".".join([self.where, *map(str, self.path)])


@dataclass
class Trace:
    """A traced model."""

    graph: Graph
    parameters: dict[Node, str]  # placeholder -> name, of parameters and persistent buffers
    fixed: dict[Node, str]  # other placeholders -> what they are
    outputs: dict[str, Node]  # by name
    mutated: list[tuple[str, Node]]  # buffers and inputs that the call writes to
    sites: list[Site]
    tensors: dict[str, Tensor]  # parameters and buffers of the model, by every name they have
    data_decides: bool = False  # whether the model asks its inputs which way to go
    position: dict[Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.position = {node: i for i, node in enumerate(self.graph.nodes)}
        self._places = {name: place(tensor) for name, tensor in self.tensors.items()}
        self._by_place: dict[Any, set[str]] = {}
        self._by_storage: dict[Any, set[str]] = {}
        for name, where in self._places.items():
            self._by_place.setdefault(where, set()).add(name)
            self._by_storage.setdefault(where[0], set()).add(name)

    def aliases(self, node: Node) -> set[str]:
        """All names of the tensor that a placeholder stands for, tied ones included."""
        name = self.parameters.get(node)
        return set() if name is None else self._by_place[self._places[name]]

    def readers(self, node: Node) -> list[str]:
        """Paths of the modules in whose calls a placeholder's tensor is read."""
        names = self.aliases(node)
        return sorted(
            {
                self._taken_in(user)
                for other, name in self.parameters.items()
                if name in names
                for user in other.users
                if user.op == "call_function"
            }
        )

    def _taken_in(self, user: Node) -> str:
        """Path of the module that an operation's operand is an attribute in: of an argument's mark,
        the caller.
        """  # fmt: skip
        stack = self.module_stack(user)
        passed = is_mark(user) and self.sites[user.args[1]].where == "input"  # type: ignore[index]
        return ([""] + (stack[:-1] if passed else stack))[-1]

    def overlaps(self, node: Node) -> str | None:
        """The name of another view of the storage that a placeholder's tensor lies in."""
        mine = self._places[self.parameters[node]]
        others = self._by_storage[mine[0]] - self._by_place[mine]
        return min(others, default=None)

    def unread(self) -> list[str]:
        """Parameters that the example inputs do not reach, by their first names."""
        read = {name for node in self.parameters if node.users for name in self.aliases(node)}
        return [
            name
            for name, tensor in self.tensors.items()
            if isinstance(tensor, nn.Parameter)
            and name not in read
            and min(self._by_place[self._places[name]]) == name
        ]

    def module_stack(self, node: Node) -> list[str]:
        """Paths of the modules whose calls a node is part of, the outermost first."""
        stack = node.meta.get("nn_module_stack") or {}
        paths = []
        for path, _ in stack.values():
            path = path.split("@")[0].removeprefix("L['self'].")
            if path == "model" or path.startswith("model."):
                paths.append(path[len("model.") :])
        return paths

    def module(self, node: Node) -> str:
        """Path of the innermost module that a node is part of."""
        return (self.module_stack(node) or [""])[-1]


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's entries lie: equal for tied tensors."""
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # no storage: sparse tensors, some subclasses
        storage = id(tensor)
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


class _Names:
    """Where a traced call leaves the names of its outputs; export does not look inside."""

    def __init__(self) -> None:
        self.found: list[str] = []


class _Flat(nn.Module):
    """A model whose result is a flat list of tensors, as export wants it."""

    def __init__(self, model: nn.Module, is_keywords: bool) -> None:
        super().__init__()
        self.model = model
        self.is_keywords = is_keywords
        self.names = _Names()

    def forward(self, inputs: Any) -> list[Tensor]:
        """Call the model; remember the names of what it returned."""
        result = self.model(**inputs) if self.is_keywords else self.model(*inputs)
        pairs = list(named_tensors(result))
        self.names.found = [name for name, _ in pairs]
        return [tensor for _, tensor in pairs]


def trace(model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> Trace:
    """Trace a model on example inputs, in evaluation mode; leaves it as it was.

    Raises:
        NotConvertible: if it cannot be traced.
    """
    sites: list[Site] = []
    wrapped = _Flat(model, isinstance(inputs, dict))
    with left_as_found(model), torch.no_grad(), _without_fast_paths():
        model.eval()
        with _marks(model, sites):
            program, data_decides = _exported(wrapped, inputs)
            names = wrapped.names.found
        program = in_elementary_operations(program)
    traced = _read(program, names, sites, model)
    if data_decides:
        traced.data_decides = True
        _refuse_hidden_ways(traced)
    return traced


def _exported(wrapped: nn.Module, inputs: Any) -> tuple[Any, bool]:
    """The exported program, and whether it is that of one way of several: where the model asks its
    data which way to go, the example inputs answer.
    """  # fmt: skip
    try:
        return torch.export.export(wrapped, (inputs,), strict=False), False
    except Exception as error:  # export raises errors of many kinds
        failure = NotConvertible("", f"it cannot be traced: {_first_line(error)}")
        failure.__cause__ = error
        if "DataDependent" not in type(error).__name__ and "data-dependent" not in str(error):
            raise failure from error
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of each answer
    try:
        with torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True):
            return torch.export.export(wrapped, (inputs,), strict=False), True
    except Exception:
        raise failure from failure.__cause__
    finally:
        log.setLevel(level)


_ASKS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")


def _refuse_hidden_ways(traced: Trace) -> None:
    """Where data decide, refuse what another way could do to the stream unseen.

    Raises:
        NotConvertible: if a parameter is read on no way that was seen, or decides itself.
    """
    for name in traced.unread():
        path = name.rpartition(".")[0]
        raise NotConvertible(
            path, "its data decide where the model goes, and the example inputs do not come here"
        )
    seen: set[Node] = set()
    pending = [(node, node) for node in traced.graph.nodes if name_of(node) in _ASKS]
    while pending:
        node, asked = pending.pop()
        if node in traced.parameters:
            where = traced.module(asked)
            raise NotConvertible(where, "it cannot be traced: what it computes decides its way")
        if node not in seen:
            seen.add(node)
            pending += [(operand, asked) for operand in node.all_input_nodes]


def _sum_of_product(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return torch.add(x, a * b, alpha=value)


def _sum_of_quotient(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return torch.add(x, a / b, alpha=value)


def _lerp(start: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return start + (end - start) * weight


def _addmm(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == alpha == 1:
        return NotImplemented  # a linear map, for which there is a rule
    return torch.add(x if beta == 1 else x * beta, a @ b, alpha=alpha)


def _baddbmm(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.add(x if beta == 1 else x * beta, torch.bmm(a, b), alpha=alpha)


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if groups == 1 and x.dim() == 2:
        return torch.nn.functional.layer_norm(x, x.shape[1:], weight, bias, eps)
    return NotImplemented


def _native_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normal = torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
    variance, mean = torch.var_mean(x, tuple(range(-len(shape), 0)), correction=0, keepdim=True)
    return normal, mean, torch.rsqrt(variance + eps)


#: What several operations in one are made of; rules speak of those.
_MADE_OF = {
    torch.ops.aten.addcmul.default: _sum_of_product,
    torch.ops.aten.addcdiv.default: _sum_of_quotient,
    torch.ops.aten.lerp.Scalar: _lerp,
    torch.ops.aten.lerp.Tensor: _lerp,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.baddbmm.default: _baddbmm,
    torch.ops.aten.group_norm.default: _group_norm,
    torch.ops.aten.native_layer_norm.default: _native_layer_norm,
}


def in_elementary_operations(program: Any) -> Any:
    """An exported program without writes and without operations that are several in one."""
    if any(
        _writes(node) or (node.target in _MADE_OF and not _is_linear(node))
        for node in program.graph.nodes
    ):
        return program.run_decompositions(dict(_MADE_OF))
    return program


def _is_linear(node: Node) -> bool:
    return name_of(node) == "aten::addmm" and not node.kwargs


def _writes(node: Node) -> bool:
    """Whether a node writes to an operand, or holds a graph of its own that may."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.op == "get_attr"


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"


def _read(program: Any, names: list[str], sites: list[Site], model: nn.Module) -> Trace:
    """The trace, from an exported program."""
    graph = program.graph_module.graph
    for node in reversed(graph.nodes):
        if name_of(node) == "aten::_assert_tensor_metadata":
            graph.erase_node(node)
    graph.eliminate_dead_code()
    signature = program.graph_signature
    persistent = _persistent_buffers(model)
    parameters: dict[Node, str] = {}
    fixed: dict[Node, str] = {}
    by_name = {node.name: node for node in graph.nodes}
    for spec in signature.input_specs:
        node = by_name[spec.arg.name]
        target = (spec.target or "").removeprefix("model.")
        kind = spec.kind.name
        if kind == "PARAMETER" or (kind == "BUFFER" and target in persistent):
            parameters[node] = target
        elif kind == "BUFFER":
            fixed[node] = f"the buffer {target}, which checkpoints leave out"
        elif kind == "USER_INPUT":
            fixed[node] = "an input of the model"
        else:
            fixed[node] = "a tensor made at run time"
    outputs: dict[str, Node] = {}
    mutated: list[tuple[str, Node]] = []
    for spec in signature.output_specs:
        value = by_name.get(getattr(spec.arg, "name", ""))
        if value is None:
            continue
        if spec.kind.name == "USER_OUTPUT":
            outputs[names[len(outputs)]] = value
        else:
            mutated.append(((spec.target or "").removeprefix("model."), value))
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return Trace(graph, parameters, fixed, outputs, mutated, sites, tensors)


def _persistent_buffers(model: nn.Module) -> set[str]:
    names = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._buffers:
            if name not in module._non_persistent_buffers_set:
                names.add(f"{path}.{name}" if path else name)
    return names


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Bring back each module's attributes and buffers, its mode and the random state, whatever
    happens. Containers stay the objects that they were: a hook's handle still removes it.
    """  # fmt: skip
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    containers = [
        (value, value.copy())
        for _, found in attributes
        for value in found.values()
        if isinstance(value, dict | list | set)
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    rng = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)
        for container, contents in containers:
            container.clear()
            if isinstance(container, list):
                container.extend(contents)
            else:
                container.update(contents)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        torch.set_rng_state(rng)
        if gpu is not None:
            torch.cuda.set_rng_state_all(gpu)


@contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Have attention and encoder layers run their modules one by one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _marks(model: nn.Module, sites: list[Site]) -> Iterator[None]:
    """Mark what each module's call takes and gives, while it is traced.

    A value that is passed twice to one call is marked once, so that ``query is key`` stays true.
    """
    numbers: dict[Site, int] = {}

    def marked(value: Any, site: Site, known: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point() or value.dim() == 0:
                return value
            if id(value) not in known:
                number = numbers.setdefault(site, len(numbers))
                if number == len(sites):
                    sites.append(site)
                known[id(value)] = torch.ops.effkern_trace.mark(value, number)
            return known[id(value)]
        if type(value) in (tuple, list):
            parts = [
                marked(part, Site(site.module, site.where, (*site.path, i)), known)
                for i, part in enumerate(value)
            ]
            return type(value)(parts)
        return value

    def before(path: str, names: list[str]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            known: dict[int, Tensor] = {}
            new = tuple(
                marked(value, Site(path, "input", (name,)), known)
                for name, value in zip(names, args, strict=False)
            )
            rest = {
                name: marked(value, Site(path, "input", (name,)), known)
                for name, value in kwargs.items()
            }
            return (*new, *args[len(new) :]), rest

        return hook

    def after(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return marked(output, Site(path, "output", ()), {})

        return hook

    for path, module in model.named_modules():
        if not path:
            continue
        module.register_forward_pre_hook(before(path, positional_names(module)), with_kwargs=True)
        module.register_forward_hook(after(path), prepend=True)
    yield


def positional_names(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward that can be passed by position."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]


def is_mark(node: Node) -> bool:
    """Whether a node is a mark."""
    return name_of(node) == "effkern_trace::mark"
