"""The state that an optimizer keeps of one parameter, in the form that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from effkern.optim.layout import is_dense, lies_like

if TYPE_CHECKING:
    from effkern.optim.fused import FusedOptimizer


def step_counter(value: float, device: torch.device | str = "cpu") -> Tensor:
    """A step counter as torch.optim keeps it: 0-dim, of the default scalar dtype."""
    with torch.inference_mode(False):
        return torch.tensor(float(value), dtype=_get_scalar_dtype(), device=device)


def create(optimizer: FusedOptimizer, group: dict[str, Any], params: Sequence[Tensor]) -> None:
    """Make the state of parameters that have none, in the parameters' order of memory.

    A step over thousands of small parameters spends most of its time on PyTorch's records of
    tensors. So step counters on the CPU, and the states of small parameters, are views of shared
    buffers, which have one storage and one version counter; and all tensors are made before the
    large ones get their memory, so that their records lie close together.

    Args:
        optimizer: whose ``state`` is filled; left without entries where memory runs out.
        group: the group of the parameters.
        params: of any strides.
    """
    names = [name for name in optimizer._states(group) if name is not None]
    if not names and not optimizer._keeps_step:
        return
    initial = optimizer._initial(group)
    made: list[dict[str, Any]] = []
    try:
        # State made in inference mode could not be written outside.
        with torch.inference_mode(False), torch.no_grad():
            likes = [dense_like(param) for param in params]
            places, sizes = _places(params)
            steps = torch.zeros(len(params), dtype=_get_scalar_dtype(), device="cpu")
            buffers = {
                (kind, name): _filled(torch.empty(size, dtype=kind[0], device=kind[1]), initial)
                for kind, size in sizes.items()
                for name in names
            }
            large = []
            for i, (param, like, place) in enumerate(zip(params, likes, places, strict=True)):
                state: dict[str, Any] = {}
                if optimizer._keeps_step:
                    device = counter_device(optimizer, group, param)
                    on_cpu = device.type == "cpu"
                    state["step"] = (
                        steps.as_strided((), (), i) if on_cpu else step_counter(0, device)
                    )
                for name in names:
                    if place is None:
                        state[name] = torch.empty(0, dtype=param.dtype, device=param.device)
                        large.append((state[name], like))
                    else:
                        buffer = buffers[(param.dtype, param.device), name]
                        state[name] = buffer.as_strided(like.shape, like.stride(), place)
                made.append(state)
            for value, like in large:
                value.resize_(like.shape)
                if value.stride() != like.stride():
                    value.as_strided_(like.shape, like.stride())
                _filled(value, initial)
    except BaseException:
        for state in made:
            state.clear()
        raise
    for param, state in zip(params, made, strict=True):
        optimizer.state[param].update(state)


def complete(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    param: Tensor,
    names: Sequence[str | None],
) -> bool:
    """Make what is missing, and bring along what no longer fits the parameter.

    A state tensor follows its parameter to another dtype, device or order of memory, as
    `Optimizer.load_state_dict` would bring it; a step counter goes to where it is counted.

    Args:
        optimizer: whose ``state`` of the parameter is changed in place.
        group: the parameter's group.
        param: of any strides; its state is dense.
        names: the keys of its state tensors, each of the parameter's shape where it is there.

    Returns:
        Whether a state tensor was made.
    """
    if not optimizer._keeps_step and not any(names):
        return False
    state = optimizer.state[param]
    if optimizer._keeps_step:
        device = counter_device(optimizer, group, param)
        step = state.get("step")
        if not isinstance(step, Tensor) or step.device != device or step.dtype not in _COUNTERS:
            state["step"] = step_counter(0.0 if step is None else float(step), device)
    like = dense_like(param)
    new = False
    for name in names:
        if name is None:
            continue
        value = state.get(name)
        if value is None or not _fits(value, param, like):
            new = new or value is None
            state[name] = _made(value, param, like, optimizer._initial(group))
    return new


def counter_device(optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor) -> torch.device:
    """Where the parameter's steps are counted: on the host, or beside it where nobody may wait."""
    beside = param.device.type != "cpu" and optimizer._counts_on_device(group)
    return param.device if beside else _CPU


def dense_like(param: Tensor) -> Tensor:
    """A tensor, without memory where it is not ``param`` itself, that lies as states of it lie."""
    return param if is_dense(param) else torch.empty_like(param, device="meta")


_CPU = torch.device("cpu")
_COUNTERS = (torch.float32, torch.float64)
_SMALL_BYTES = 65536
_ALIGNED = 64  # elements; whole cache lines


def _places(params: Sequence[Tensor]) -> tuple[list[int | None], dict[Any, int]]:
    """Where in a shared buffer of its dtype and device the state of each parameter begins.

    Returns:
        An offset in elements for each parameter, None for a large one, and the size of the buffer
        for each dtype and device.
    """
    sizes: dict[Any, int] = {}
    places: list[int | None] = []
    for param in params:
        if param.nbytes > _SMALL_BYTES:
            places.append(None)
            continue
        kind = (param.dtype, param.device)
        begin = sizes.get(kind, 0)
        places.append(begin)
        sizes[kind] = begin + (param.numel() + _ALIGNED - 1) // _ALIGNED * _ALIGNED
    return places, sizes


def _fits(value: Tensor, param: Tensor, like: Tensor) -> bool:
    return (
        value.dtype == param.dtype
        and value.device == param.device
        and (value.stride() == like.stride() or lies_like(value, like))
    )


def _made(value: Tensor | None, param: Tensor, like: Tensor, initial: float) -> Tensor:
    """New state, or ``value`` where there is one, as ``param`` with the strides of ``like``."""
    # State made in inference mode could not be written outside.
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty_strided(
            like.shape, like.stride(), dtype=param.dtype, device=param.device
        )
        return _filled(made, initial) if value is None else made.copy_(value)


def _filled(tensor: Tensor, value: float) -> Tensor:
    """``tensor``, with ``value`` in each real number of it."""
    return tensor.fill_(complex(value, value) if tensor.is_complex() else value)
