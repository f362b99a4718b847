"""The numerical check that closes a conversion: the outputs before and after, on several inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from effkern.convert.flatten import named_tensors
from effkern.convert.report import Check, NotConvertible
from effkern.convert.trace import left_as_found

__all__ = ["Sample", "compare", "computing_in_float64", "outputs_of", "samples"]

Inputs = tuple[Any, ...] | dict[str, Any]

#: The largest difference that passes, relative to the largest entry of an output or to one.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class Sample:
    """Inputs to compare on, and what they are."""

    what: str
    inputs: Inputs


def samples(inputs: Inputs) -> Iterator[Sample]:
    """The example inputs, then random ones of their kind, of another batch and of another length.

    Integers are drawn from those in the example, so that they stay in their vocabulary; masks and
    positions stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    yield Sample("the example inputs", inputs)
    yield Sample("random inputs", _mapped(inputs, lambda x: _random(x, generator)))
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 0]
    if not tensors:
        return
    batch = tensors[0].shape[0]

    def more_rows(x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[0] != batch:
            return x
        return _random(torch.cat([x, x[:1]]), generator)

    yield Sample("random inputs of another batch size", _mapped(inputs, more_rows))
    length = next((x.shape[1] for x in tensors if 2 <= x.dim() <= 3 and x.shape[1] > 2), None)
    if length is None:
        return

    def shorter(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != length:
            return x
        return _random(x[:, : length - 1], generator)

    yield Sample("random inputs of another length", _mapped(inputs, shorter))


def _mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, inputs)


def _random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Another tensor of this kind and shape."""
    if x.numel() == 0 or x.is_complex() or x.dtype == torch.bool:
        return x
    if x.is_floating_point():
        if not x.isfinite().all() or _is_mask(x):
            return x
        spread = x.double().std(correction=0).item()
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) * spread
        return (noise + x.double().mean().item()).to(x.dtype).to(x.device)
    if _is_mask(x) or _ascends(x):
        return x
    order = torch.randint(x.numel(), x.shape, generator=generator)
    return x.flatten()[order.to(x.device)]


def _is_mask(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _ascends(x: Tensor) -> bool:
    """Whether each row counts upwards, as positions do."""
    return x.dim() > 0 and x.shape[-1] > 1 and bool((x.diff(dim=-1) == 1).all())


def outputs_of(model: nn.Module, inputs: Inputs, *, wide: bool) -> dict[str, Tensor]:
    """What a model returns in evaluation mode, by name, without a trace of the call in it."""
    if wide:
        inputs = _mapped(inputs, lambda x: x.double() if x.is_floating_point() else x)
    with left_as_found(model), torch.no_grad():
        model.eval()
        torch.manual_seed(0)  # some models draw random numbers in evaluation too
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        return {name: tensor.detach().clone() for name, tensor in named_tensors(result)}


def compare(
    sample: Sample,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    names: list[str],
    dtype: torch.dtype,
) -> Check:
    """How far outputs are apart.

    Raises:
        NotConvertible: if it is more than the dtype allows.
    """
    worst = 0.0
    for name in names:
        if name not in before:  # an output that depends on the inputs' size
            continue
        if name not in after or after[name].shape != before[name].shape:
            raise NotConvertible("", f"on {sample.what} output {name!r} has another shape")
        worst = max(worst, _difference(before[name], after[name]))
    check = Check(sample.what, str(dtype).removeprefix("torch."), worst, TOLERANCES[dtype])
    if not worst <= check.tolerance:
        raise NotConvertible(
            "",
            f"on {sample.what} the outputs differ by {worst:.1e} in {check.dtype}, "
            f"more than {check.tolerance:.0e}",
        )
    return check


def _difference(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest finite entry or to one."""
    if not before.is_floating_point():
        return 0.0 if torch.equal(before, after) else float("inf")
    if before.numel() == 0:
        return 0.0
    a, b = before.double(), after.double()
    finite = a.isfinite()
    if not torch.equal(a[~finite].nan_to_num(0.5), b[~finite].nan_to_num(0.5)):
        return float("inf")
    if not finite.any():
        return 0.0
    size = max(1.0, a[finite].abs().max().item())
    return (a[finite] - b[finite]).abs().max().item() / size


@contextmanager
def computing_in_float64() -> Iterator[None]:
    """Let new tensors be float64, and casts to a narrower floating dtype be casts to float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(default)


_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


class _Widen(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CASTS:
            return args[0].double()
        args = tuple(_widened(x) for x in args)
        kwargs = {key: _widened(x) for key, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
