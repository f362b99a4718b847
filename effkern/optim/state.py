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

    All tensors are made before any gets its memory: so PyTorch's records of them lie close
    together, and the checks of each step, which read little else, wait for far less memory.

    Args:
        states: empty dictionaries, filled in place; left empty where memory runs out.
        params: their parameters, of any strides.
        names: the keys of the state tensors.
    """
    try:
        # State made in inference mode could not be written outside.
        with torch.inference_mode(False), torch.no_grad():
            for state, param in zip(states, params, strict=True):
                state["step"] = step_counter(0.0)
                for name in names:
                    state[name] = torch.empty(0, dtype=param.dtype, device=param.device)
            for name in names:
                for state, param in zip(states, params, strict=True):
                    value = state[name].resize_(param.shape)
                    like = dense_like(param)
                    if value.stride() != like.stride():
                        value.as_strided_(like.shape, like.stride())
                    value.zero_()
    except BaseException:
        for state in states:
            state.clear()
        raise


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
