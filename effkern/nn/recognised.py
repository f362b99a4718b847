"""Norms of other libraries, recognised by what they compute, and their fused twins.

Transformers models bring classes of their own, which differ in where they round and whether the
weight is counted from zero or from one. A `Form` is one such convention; `recognise` finds the one
that reproduces a module on random numbers in every mixture of float32 and bfloat16.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkern.backends.choice import use_backend
from effkern.nn.functional import layer_norm, rms_norm
from effkern.nn.norm import LayerNorm, RMSNorm
from effkern.ops._declare import DTYPES

HALF = (torch.bfloat16, torch.float16)


class Form(NamedTuple):
    """One convention for a norm over the last dimension.

    Attributes:
        rounds: to what xhat is rounded before the weight multiplies it: "nothing" (the product is
            rounded to the input's dtype: Gemma's classes), "input" (to the input's dtype; the
            product has the wider dtype of both: Llama's) or "weight" (to the weight's dtype where
            that has 16 bits: T5's).
        offset: is added to the weight, in float32.
        centred: whether it takes the mean off, as LayerNorm.
    """

    rounds: str
    offset: float
    centred: bool

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """The norm of x over its last dimension."""
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            # Written in plain operations, the originals keep their dtypes under autocast.
            with torch.autocast("cuda", enabled=False):
                return self(x, weight, bias, eps)
        if weight is None:
            return self._kernel(x, None, bias, eps)
        if self.offset:
            weight = weight.float() + self.offset
        if self.rounds == "nothing" or x.dtype == weight.dtype == torch.float32:
            return self._kernel(x, weight, bias, eps)
        if self.rounds == "input":
            return weight * self._kernel(x, None, None, eps)
        if weight.dtype not in HALF:
            return self._kernel(x.to(weight.dtype), weight, bias, eps)
        wide = x if x.dtype == weight.dtype else x.float()
        return weight * self._kernel(wide, None, None, eps).to(weight.dtype)

    def _kernel(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        if self.centred:
            return layer_norm(x, x.shape[-1:], weight, bias, eps)
        return rms_norm(x, x.shape[-1:], weight, eps)


#: The commonest first. A bias goes with LayerNorm's own convention alone.
FORMS = tuple(
    Form(rounds, offset, centred)
    for centred in (False, True)
    for rounds in ("input", "nothing", "weight")
    for offset in (0.0, 1.0)
    if not (rounds == "weight" and offset)
)


class Recognised(NamedTuple):
    """How a module computes its norm.

    Attributes:
        form: the convention.
        eps: the name of the module's attribute that holds it.
        weight: the name of the module's parameter; None without.
        bias: the same.
    """

    form: Form
    eps: str
    weight: str | None
    bias: str | None


class NotRecognised(Exception):
    """Why a module stays as it is."""


def recognise(module: nn.Module) -> Recognised:
    """Find out how ``module`` normalises; it is not changed, and PyTorch's generators are not used.

    Raises:
        NotRecognised: if no form reproduces it, with the reason.
    """
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None:
        raise NotRecognised("it has children or buffers")
    arguments = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(arguments) != 1 or arguments[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise NotRecognised("its forward takes more than the input")
    parameters = dict(module.named_parameters())
    if not set(parameters) <= {"weight", "bias"}:
        raise NotRecognised(f"it has the parameters {', '.join(parameters)}")
    shapes = {tuple(parameter.shape) for parameter in parameters.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or shape == (0,) for shape in shapes):
        raise NotRecognised("its parameters are not of one dimension, the last one of the input")
    if any(parameter.dtype not in DTYPES for parameter in parameters.values()):
        raise NotRecognised("its parameters are of a dtype that the kernels do not take")
    epsilons = [
        name for name, value in vars(module).items() if isinstance(value, float) and 0 < value < 0.1
    ]
    if not epsilons:
        raise NotRecognised("no attribute holds an epsilon")
    weight, bias = (name if name in parameters else None for name in ("weight", "bias"))
    probes = list(_probes(module, next(iter(shapes), (48,))[0], epsilons))
    for eps in sorted(epsilons, key=lambda name: "eps" not in name):
        for form in FORMS:
            if bias is not None and (form.rounds != "nothing" or not form.centred):
                continue
            found = Recognised(form, eps, weight, bias)
            if all(_agrees(probe, found) for probe in probes):
                return found
    raise NotRecognised("no known convention gives its results in float32 and bfloat16")


class _Probe(NamedTuple):
    """What a module with random parameters gives for a random input; None where it raises."""

    module: nn.Module
    x: Tensor
    y: Tensor | None


def _probes(module: nn.Module, features: int, epsilons: list[str]) -> Iterator[_Probe]:
    generator = torch.Generator().manual_seed(0)
    rows = max(4, 8192 // features)
    # The device is named throughout, for torch.set_default_device.
    wide = torch.randn(2, rows, features, generator=generator, device="cpu")
    # Some rows are as small as epsilon's root, where it matters what it is added to.
    wide[1] *= max(getattr(module, name) for name in epsilons) ** 0.5
    wide[0, ::2] += 1
    values = [torch.randn(features, generator=generator, device="cpu") for _ in range(2)]
    dtypes = (torch.float32, torch.bfloat16)
    has_parameters = any(parameter is not None for parameter in module._parameters.values())
    # With four dimensions the last is not the third: some norms count from the front.
    shapes = ((2, rows, features), (2, 1, rows, features))
    for x_dtype, dtype, training, shape in itertools.product(dtypes, dtypes, (False, True), shapes):
        if dtype != torch.float32 and not has_parameters:
            continue  # the same again
        probe = copy.copy(module)
        probe.__dict__ = dict(vars(module))
        probe.training = training
        probe._parameters = {
            name: None if parameter is None else nn.Parameter(value.to(dtype))
            for (name, parameter), value in zip(module._parameters.items(), values, strict=False)
        }
        x, y = wide.to(x_dtype).view(shape), None
        # Modules that are no norms are tried too: dropout draws, instance norm warns.
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                y = type(module).forward(probe, x.clone())
            except Exception:  # whatever it raises: it does not take this mixture
                y = None
        yield _Probe(probe, x, y)


def _agrees(probe: _Probe, found: Recognised) -> bool:
    """Whether the form gives the probe's result: in float32 but for a few roundings, in bfloat16
    but for the rare value that they carry over the middle between two.
    """
    expected = probe.y
    if expected is None:
        return probe.x.dtype != torch.float32 or any(
            p is not None and p.dtype != torch.float32 for p in probe.module._parameters.values()
        )
    if not isinstance(expected, Tensor):
        return False
    # Probes lie on the CPU, whatever backend the caller has chosen for tensors elsewhere.
    with torch.no_grad(), use_backend(None):
        mine = apply(probe.module, found, probe.x)
    if mine.dtype != expected.dtype or mine.shape != expected.shape:
        return False
    a, b = mine.double(), expected.double()
    eps = torch.finfo(expected.dtype).eps
    if expected.dtype != torch.float32:
        if (a != b).double().mean() > 0.02:
            return False
        return bool(((a - b).abs() <= eps * torch.maximum(a.abs(), b.abs())).all())
    return bool(((a - b).abs() <= 8 * eps * b.abs().amax(-1, keepdim=True)).all())


def apply(module: nn.Module, how: Recognised, x: Tensor) -> Tensor:
    """The norm of x by the module's own parameters and epsilon, as they are now."""
    weight = None if how.weight is None else getattr(module, how.weight)
    bias = None if how.bias is None else getattr(module, how.bias)
    return how.form(x, weight, bias, getattr(module, how.eps))


#: The attribute by which a fused twin knows what it stands for.
HOW = "_effkern_recognised"


_twins: dict[tuple[type[nn.Module], bool, str], type[nn.Module]] = {}


def twin_class(original: type[nn.Module], centred: bool, eps: str) -> type[nn.Module]:
    """The class of fused modules in place of ``original``: a subclass of effkern's norm and of it.

    Args:
        original: the class.
        centred: whether effkern's norm is LayerNorm, else RMSNorm.
        eps: the name of the attribute that holds epsilon.
    """
    key = original, centred, eps
    if key in _twins:
        return _twins[key]
    signature = inspect.signature(original.forward)
    argument = list(signature.parameters)[1]

    def forward(self: Any, *given: Tensor, **named: Tensor) -> Tensor:
        """As the original's, in one kernel where it rounds once."""
        if len(given) + len(named) != 1 or not (given or argument in named):
            raise TypeError(f"{original.__name__}.forward() takes one argument, {argument}")
        return apply(self, getattr(self, HOW), given[0] if given else named[argument])

    def extra_repr(self: Any) -> str:
        """As the original's."""
        return str(original.extra_repr(self))

    def reduce_ex(self: Any, protocol: Any) -> Any:
        """Found again by the original's class: this one is made at run time."""
        return _empty_twin, (original, centred, eps), dict(vars(self))

    members: dict[str, Any] = {
        "forward": forward,
        "extra_repr": extra_repr,
        "__reduce_ex__": reduce_ex,
        "__module__": __name__,
        # What PyTorch's norms have.
        "normalized_shape": _Unless(_shape),
        "elementwise_affine": _Unless(lambda self: bool(_present(self))),
    }
    if eps != "eps":
        members["eps"] = _Unless(lambda self: getattr(self, eps))
    forward.__signature__ = signature  # type: ignore[attr-defined]
    base = LayerNorm if centred else RMSNorm
    # The original first: its other methods, as reset_parameters, stay its own.
    return _twins.setdefault(key, type(f"Fused{original.__name__}", (original, base), members))


class _Unless:
    """An attribute that is computed unless the instance has one of its own."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self._compute = compute

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self._compute(instance)


def _present(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _shape(module: nn.Module) -> tuple[int, ...]:
    """The normalised one; without parameters nobody knows."""
    return next((tuple(parameter.shape) for parameter in _present(module)), (0,))


def _empty_twin(original: type[nn.Module], centred: bool, eps: str) -> nn.Module:
    twin = twin_class(original, centred, eps)
    return twin.__new__(twin)
