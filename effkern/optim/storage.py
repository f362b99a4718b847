"""How the state of a parameter is stored: which keys, in which dtypes, with which extras."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effkern.backends.table import STATE_TYPES
from effkern.optim.distributed import shard_number

if TYPE_CHECKING:
    from effkern.optim.fused import FusedOptimizer

#: What may be asked for as ``state_dtype``.
STATE_DTYPES = (None, torch.float32, torch.bfloat16, "int8")

#: The options of a group that say how state is stored.
OPTIONS = ("master_weights", "state_dtype", "stochastic_rounding")

MASTER = "master_param"
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Storage:
    """How one parameter's state is stored.

    Attributes:
        state: the dtype of its state tensors, or "int8": codes of 8 bits and the scales of their
            blocks, under two keys of their own.
        as_param: whether that is the parameter's own dtype.
        master: whether there is a float32 master of the parameter.
        stochastic: whether the parameter is rounded stochastically.
    """

    state: torch.dtype | str
    as_param: bool
    master: bool
    stochastic: bool

    @property
    def quantized(self) -> bool:
        """Whether states are stored in 8 bits."""
        return self.state == "int8"

    def keys(self, names: Sequence[str]) -> list[str]:
        """The keys of a parameter's tensors, but for the step, where its states are ``names``."""
        keys: list[str] = []
        for name in names:
            keys += [codes_key(name), scales_key(name)] if self.quantized else [name]
        return [*keys, MASTER] if self.master else keys

    def codes(self) -> tuple[int, int]:
        """The numbers that stand for this in a plan's ``layouts``."""
        state = 0 if self.as_param else STATE_TYPES.index(self.state)
        return state, int(self.master) + 2 * self.stochastic


def codes_key(name: str) -> str:
    """The key of the codes of state ``name``."""
    return f"{name}_codes"


def scales_key(name: str) -> str:
    """The key of the scales of their blocks."""
    return f"{name}_scales"


def storage_of(group: dict[str, Any], param: Tensor) -> Storage:
    """How the options of ``group`` would have the state of ``param``."""
    wanted = group.get("state_dtype")
    narrow = param.dtype in _NARROW
    return Storage(
        state=param.dtype if wanted is None else wanted,
        as_param=wanted is None or wanted == param.dtype,
        master=narrow and bool(group.get("master_weights")),
        stochastic=param.dtype == torch.bfloat16 and bool(group.get("stochastic_rounding")),
    )


def asked_options(
    master_weights: bool, state_dtype: torch.dtype | str | None, stochastic_rounding: bool
) -> dict[str, Any]:
    """What a group holds of these options: only what was asked for, so that others are torch's.

    Raises:
        ValueError: if ``state_dtype`` is none of `STATE_DTYPES`.
    """
    if state_dtype not in STATE_DTYPES:
        raise ValueError(
            "state_dtype must be None, torch.float32, torch.bfloat16 or 'int8', "
            f"got {state_dtype!r}"
        )
    asked = {
        "master_weights": master_weights,
        "state_dtype": state_dtype,
        "stochastic_rounding": stochastic_rounding,
    }
    return {name: value for name, value in asked.items() if value}


def rounding_keys(optimizer: FusedOptimizer, params: Sequence[Tensor]) -> list[int]:
    """The keys of parameters' random bits: of the seed, of their places and of their shards.

    The seed is `torch.initial_seed` when the optimizer first rounds; in a distributed program it is
    the same on every process, so that replicas stay equal.
    """
    if optimizer._rounding_seed is None:
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        optimizer._rounding_seed = torch.initial_seed() if alone else 0
    seed = optimizer._rounding_seed * 0x9E3779B97F4A7C15
    everyone = (param for group in optimizer.param_groups for param in group["params"])
    places = {id(param): place for place, param in enumerate(everyone)}
    keys = []
    for param in params:
        of_place = places[id(param)] * 0xD1B54A32D192ED03
        of_shard = shard_number(param) * 0x94D049BB133111EB
        key = (seed + of_place + of_shard) % 2**64
        keys.append(key - 2**64 if key >= 2**63 else key)
    return keys
