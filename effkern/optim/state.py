"""The state that an optimizer keeps of one parameter, in the form that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from effkern.backends.reference.quantize import dequantized, quantized
from effkern.backends.table import QUANTIZED_BLOCK
from effkern.optim.distributed import is_dtensor, local_tensor, wrapped_like
from effkern.optim.layout import is_dense, lies_like
from effkern.optim.storage import MASTER, Storage, codes_key, scales_key, storage_of

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
        params: of any strides; the states of DTensors are DTensors of the same mesh and
            placements, but for 8 bits, which are plain tensors of this process alone.
    """
    names = [name for name in optimizer._states(group) if name is not None]
    made: list[dict[str, Any]] = []
    try:
        # State made in inference mode could not be written outside.
        with torch.inference_mode(False), torch.no_grad():
            steps = torch.zeros(len(params), dtype=_get_scalar_dtype(), device="cpu")
            shards = list(map(local_tensor, params))
            wanted = [_wanted(optimizer, group, param, names) for param in params]
            buffers = _Buffers(wanted)
            large = []
            for i, (param, of_param) in enumerate(zip(params, wanted, strict=True)):
                state: dict[str, Any] = {}
                if optimizer._has_step(group):
                    device = counter_device(optimizer, group, param)
                    shared = steps.as_strided((), (), i)
                    state["step"] = shared if device == _CPU else step_counter(0, device)
                for one in of_param:
                    if one.small:
                        state[one.key] = buffers.next(one)
                    else:
                        state[one.key] = torch.empty(0, dtype=one.dtype, device=one.device)
                        large.append((state[one.key], one))
                made.append(state)
            for value, one in large:
                value.resize_(one.like.shape)
                if value.stride() != one.like.stride():
                    value.as_strided_(one.like.shape, one.like.stride())
                _filled(value, one.initial)
            for shard, state in zip(shards, made, strict=True):
                if MASTER in state:
                    state[MASTER].copy_(shard)
    except BaseException:
        for state in made:
            state.clear()
        raise
    for param, state in zip(params, made, strict=True):
        if is_dtensor(param):
            for key in {*names, MASTER} & state.keys():
                state[key] = wrapped_like(state[key], param)
        if state:
            optimizer.state[param].update(state)


def complete(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    param: Tensor,
    names: Sequence[str | None],
) -> bool:
    """Make what is missing, and bring along what no longer fits the parameter or the options.

    A state tensor follows its parameter to another dtype, device or order of memory, as
    `Optimizer.load_state_dict` would bring it, or into and out of 8 bits; a step counter goes to
    where it is counted.

    Args:
        optimizer: whose ``state`` of the parameter is changed in place.
        group: the parameter's group.
        param: of any strides; its state is dense.
        names: the keys of its state tensors, each of the parameter's shape where it is there.

    Returns:
        Whether a state tensor was made.
    """
    kept = [name for name in names if name is not None]
    storage, local = storage_of(group, param), local_tensor(param)
    if not optimizer._has_step(group) and not storage.keys(kept) and param not in optimizer.state:
        return False
    state = optimizer.state[param]
    if optimizer._has_step(group):
        device = counter_device(optimizer, group, param)
        step = state.get("step")
        if not isinstance(step, Tensor) or step.device != device or step.dtype not in _COUNTERS:
            taken = optimizer._steps_taken(state) if step is None else float(step)
            state["step"] = step_counter(taken, device)
    elif not optimizer._keeps_step:
        state.pop("step", None)  # was there for stochastic rounding
    new = False
    for name in kept:
        if storage.quantized != (codes_key(name) in state):
            _recode(state, name, param, storage, optimizer._is_signed(group, name))
    for one in _wanted(optimizer, group, param, kept):
        value = local_tensor(state.get(one.key))
        if value is None or not one.fits(value):
            new = new or value is None
            if value is None and one.key == MASTER:
                value = local
            made = one.made(value)
            state[one.key] = wrapped_like(made, param) if one.key in (*kept, MASTER) else made
    if not storage.master:
        state.pop(MASTER, None)
    return new


def own_memory(state: dict[str, Any]) -> None:
    """Give memory of its own to each tensor of a state that is cut from the middle of a buffer.

    Inductor copies what an op in its graph writes to. Before PyTorch 2.13 it takes the copy from
    the wrong place where the tensor does not begin with its storage.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and not is_dtensor(value) and value.storage_offset() != 0:
            state[key] = value.clone()


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


@dataclass(frozen=True)
class _Wanted:
    """A tensor that a parameter's state must have."""

    key: str
    dtype: torch.dtype
    device: torch.device
    like: Tensor  # its shape and strides
    initial: float
    own_memory: bool

    @property
    def small(self) -> bool:
        return not self.own_memory and self.like.numel() * self.dtype.itemsize <= _SMALL_BYTES

    def fits(self, value: Tensor) -> bool:
        return (
            value.dtype == self.dtype
            and value.device == self.device
            and (value.stride() == self.like.stride() or lies_like(value, self.like))
        )

    def made(self, value: Tensor | None) -> Tensor:
        """A new tensor, with the values of ``value`` where there is one."""
        # State made in inference mode could not be written outside.
        with torch.inference_mode(False), torch.no_grad():
            shape, stride = self.like.shape, self.like.stride()
            new = torch.empty_strided(shape, stride, dtype=self.dtype, device=self.device)
            return _filled(new, self.initial) if value is None else new.copy_(value)


def _wanted(
    optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor, names: Sequence[str]
) -> list[_Wanted]:
    """All tensors of a parameter's state but the step, in the order of its keys."""
    # A DTensor of a tensor that begins behind its storage's first byte cannot be deep-copied.
    own_memory, param = is_dtensor(param), local_tensor(param)
    storage, like = storage_of(group, param), dense_like(param)
    initial = optimizer._initial(group)
    wanted = []
    for name in names:
        if isinstance(storage.state, torch.dtype):
            wanted.append(_Wanted(name, storage.state, param.device, like, initial, own_memory))
            continue
        signed = optimizer._is_signed(group, name)
        blocks = torch.empty(-(-param.numel() // QUANTIZED_BLOCK), device="meta")
        dtype, code = (torch.int8, 127) if signed else (torch.uint8, 255)
        code = code if initial else 0
        wanted += [
            _Wanted(codes_key(name), dtype, param.device, like, code, own_memory),
            _Wanted(scales_key(name), torch.float32, param.device, blocks, initial, own_memory),
        ]
    if storage.master:
        wanted.append(_Wanted(MASTER, torch.float32, param.device, like, 0.0, own_memory))
    return wanted


def export(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Bring the states of a state_dict in the form that loads in torch, on any number of processes.

    Those of DTensors in 8 bits become float32 DTensors, since blocks are cut within a shard;
    loaded, they become the same codes again where the shards are the same.

    Args:
        optimizer: whose state_dict it is.
        state_dict: with states by the parameters' numbers; these are not changed, but replaced.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = state_dict["state"] = dict(state_dict["state"])
    for i, param in enumerate(params):
        if i not in states:
            continue
        state = optimizer._saved(param, states.pop(i))
        if is_dtensor(param):
            state = dict(state)
            for codes in [key for key in state if key == codes_key(key.removesuffix("_codes"))]:
                _dequantize(state, codes.removesuffix("_codes"), param)
        if state:
            states[i] = state


def keep_dtypes(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Undo that `Optimizer.load_state_dict` cast what is not stored in the parameters' dtypes.

    Args:
        optimizer: which has just loaded ``state_dict``; its states are changed in place.
        state_dict: as it was loaded.
    """
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for group in optimizer.param_groups:
        for param, i in zip(group["params"], saved, strict=False):
            as_param = storage_of(group, param).as_param
            cast = optimizer._states(group) if as_param else ()
            for key, value in state_dict["state"].get(i, {}).items():
                loaded = optimizer.state[param].get(key)
                both = isinstance(value, Tensor) and isinstance(loaded, Tensor)
                if both and key not in ("step", *cast) and loaded.dtype != value.dtype:
                    optimizer.state[param][key] = value.to(param.device)


def _recode(
    state: dict[str, Any], name: str, param: Tensor, storage: Storage, signed: bool
) -> None:
    """Bring a state of ``param``, if it is there, from floating point to 8 bits or back."""
    codes, scales = codes_key(name), scales_key(name)
    if storage.quantized and state.get(name) is not None:
        value = local_tensor(state.pop(name))
        state[codes], state[scales] = quantized(
            value if is_dense(value) else value.contiguous(), signed
        )
    elif not storage.quantized:
        _dequantize(state, name, param)


def _dequantize(state: dict[str, Any], name: str, param: Tensor) -> None:
    values = dequantized(state.pop(codes_key(name)), state.pop(scales_key(name)))
    state[name] = wrapped_like(values, param)


class _Buffers:
    """One buffer for each key, dtype and device of the small tensors wanted, cut as they come."""

    def __init__(self, wanted: Sequence[Sequence[_Wanted]]) -> None:
        sizes: dict[Any, int] = {}
        initials: dict[Any, float] = {}
        for one in (one for of_param in wanted for one in of_param if one.small):
            kind = (one.key, one.dtype, one.device)
            sizes[kind] = sizes.get(kind, 0) + _aligned(one.like.numel())
            initials[kind] = one.initial
        self._buffers = {
            kind: _filled(torch.empty(size, dtype=kind[1], device=kind[2]), initials[kind])
            for kind, size in sizes.items()
        }
        self._used = dict.fromkeys(sizes, 0)

    def next(self, one: _Wanted) -> Tensor:
        """The next tensor of its kind."""
        kind = (one.key, one.dtype, one.device)
        begin = self._used[kind]
        self._used[kind] += _aligned(one.like.numel())
        return self._buffers[kind].as_strided(one.like.shape, one.like.stride(), begin)


def _aligned(numel: int) -> int:
    return (numel + _ALIGNED - 1) // _ALIGNED * _ALIGNED


def _filled(tensor: Tensor, value: float) -> Tensor:
    """``tensor``, with ``value`` in each real number of it."""
    return tensor.fill_(complex(value, value) if tensor.is_complex() else value)
