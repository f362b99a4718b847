"""The state that an optimizer keeps of one parameter, in the form that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from effkern.optim.layout import is_dense, lies_like


def step_counter(value: float) -> Tensor:
    """A step counter as torch.optim keeps it: 0-dim on the CPU, of the default scalar dtype."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=_get_scalar_dtype(), device="cpu")


def create(
    states: Sequence[dict[str, Any]], params: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Make the state of parameters that have none: zeros, in the parameter's order of memory.

    A step over thousands of small parameters spends most of its time on PyTorch's records of
    tensors. So step counters, and the states of small parameters, are views of shared buffers,
    which have one storage and one version counter; and all tensors are made before the large ones
    get their memory, so that their records lie close together.

    Args:
        states: empty dictionaries, filled in place; left empty where memory runs out.
        params: their parameters, of any strides.
        names: the keys of the state tensors.
    """
    try:
        # State made in inference mode could not be written outside.
        with torch.inference_mode(False), torch.no_grad():
            likes = [dense_like(param) for param in params]
            places, sizes = _places(params)
            steps = torch.zeros(len(params), dtype=_get_scalar_dtype(), device="cpu")
            buffers = {
                (kind, name): torch.zeros(size, dtype=kind[0], device=kind[1])
                for kind, size in sizes.items()
                for name in names
            }
            large = []
            for i, (state, param, like, place) in enumerate(
                zip(states, params, likes, places, strict=True)
            ):
                state["step"] = steps.as_strided((), (), i)
                for name in names:
                    if place is None:
                        state[name] = torch.empty(0, dtype=param.dtype, device=param.device)
                        large.append((state[name], like))
                    else:
                        buffer = buffers[(param.dtype, param.device), name]
                        state[name] = buffer.as_strided(like.shape, like.stride(), place)
            for value, like in large:
                value.resize_(like.shape)
                if value.stride() != like.stride():
                    value.as_strided_(like.shape, like.stride())
                value.zero_()
    except BaseException:
        for state in states:
            state.clear()
        raise


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


def complete(state: dict[str, Any], param: Tensor, names: Sequence[str]) -> None:
    """Make what is missing, and bring along what no longer fits the parameter.

    A state tensor follows its parameter to another dtype, device or order of memory, as
    `Optimizer.load_state_dict` would bring it; a step counter goes to the host.

    Args:
        state: the parameter's entry in ``optimizer.state``, changed in place.
        param: of any strides; its state is dense.
        names: the keys of its state tensors, each of the parameter's shape where it is there.
    """
    step = state.get("step")
    if not isinstance(step, Tensor) or not step.is_cpu or step.dtype not in _COUNTERS:
        state["step"] = step_counter(0.0 if step is None else float(step))
    like = dense_like(param)
    for name in names:
        value = state.get(name)
        if value is None or not _fits(value, param, like):
            state[name] = _made(value, param, like)


def dense_like(param: Tensor) -> Tensor:
    """A tensor, without memory where it is not ``param`` itself, that lies as states of it lie."""
    return param if is_dense(param) else torch.empty_like(param, device="meta")


_COUNTERS = (torch.float32, torch.float64)


def _fits(value: Tensor, param: Tensor, like: Tensor) -> bool:
    return (
        value.dtype == param.dtype
        and value.device == param.device
        and (value.stride() == like.stride() or lies_like(value, like))
    )


def _made(value: Tensor | None, param: Tensor, like: Tensor) -> Tensor:
    """Zeros, or ``value`` where there is one, as ``param`` with the strides of ``like``."""
    # State made in inference mode could not be written outside.
    with torch.inference_mode(False), torch.no_grad():
        if value is None:
            return torch.zeros_like(param, memory_format=torch.preserve_format)
        made = torch.empty_strided(
            like.shape, like.stride(), dtype=param.dtype, device=param.device
        )
        return made.copy_(value)
