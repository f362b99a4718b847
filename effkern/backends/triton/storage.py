"""How a step's tensors are stored, as the kernels are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from effkern.backends.table import DTYPES, STATE_TYPES
from effkern.backends.triton.numerics import TRITON_DTYPE


class Storage(NamedTuple):
    """A constant of the kernels.

    Attributes:
        plain: whether everything has the parameters' dtype and is rounded to the nearest.
        param: what the parameters are read from: float32 where they have masters.
        state: of the states; int8 stands for 8 bits, with scales.
        signed: a mask of the states whose values may be negative.
        masters: whether the parameters have masters.
        stochastic: whether they are rounded stochastically.
    """

    plain: bool
    param: tl.dtype
    state: tl.dtype
    signed: int
    masters: bool
    stochastic: bool

    @property
    def quantized(self) -> bool:
        """Whether states are stored in 8 bits; for the host."""
        return self.state == tl.int8

    def widest(self, dtype: torch.dtype) -> int:
        """Bytes of the longest element, where parameters are of ``dtype``; for the host."""
        bits = max(self.param.primitive_bitwidth, self.state.primitive_bitwidth)
        return max(bits // 8, dtype.itemsize)

    def dtype_of_state(self, index: int) -> torch.dtype:
        """Of the tensors of state ``index``; for the host."""
        if self.quantized:
            return torch.int8 if self.signed >> index & 1 else torch.uint8
        return _TORCH_DTYPE[self.state]


_TORCH_DTYPE = {ours: dtype for dtype, ours in TRITON_DTYPE.items()}
_8_BITS = (torch.int8, torch.uint8)
_FLOATING = (torch.float32, torch.bfloat16)


def of_lists(
    params: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    signed: Sequence[bool],
    masters: Sequence[Tensor],
    rounding_keys: Sequence[int],
) -> Storage:
    """How the tensors of a call are stored; ``states``: those that are kept.

    A dtype that no state may have is taken for the parameters', so that it is refused as such.
    """
    dtype = params[0].dtype
    state: torch.dtype | str = STATE_TYPES[0]
    if states and states[0]:
        has = states[0][0].dtype
        if has in _8_BITS:
            state = "int8"
        elif has != dtype and has in _FLOATING:
            state = has
    return _storage(dtype, state, signed, bool(masters), bool(rounding_keys))


def of_layouts(layouts: Sequence[int], signed: Sequence[bool]) -> Storage:
    """How the tensors of a plan are stored; ``layouts``: its first four numbers at least."""
    dtype, _, state, extras = layouts[:4]
    return _storage(DTYPES[dtype], STATE_TYPES[state], signed, bool(extras & 1), bool(extras & 2))


def _storage(
    dtype: torch.dtype,
    state: torch.dtype | str,
    signed: Sequence[bool],
    masters: bool,
    stochastic: bool,
) -> Storage:
    as_param = state == STATE_TYPES[0]
    if as_param:
        of_state = TRITON_DTYPE[dtype]
    else:
        of_state = tl.int8 if isinstance(state, str) else TRITON_DTYPE[state]
    return Storage(
        plain=as_param and not masters and not stochastic,
        param=tl.float32 if masters else TRITON_DTYPE[dtype],
        state=of_state,
        signed=sum(1 << i for i, may_be in enumerate(signed) if may_be),
        masters=masters,
        stochastic=stochastic,
    )
