"""An optimizer of effkern beside its twin of torch.optim in float64, one tensor after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import effkern
from tests.support import oracles

_TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.complex64: {"rtol": 1e-5, "atol": 1e-6},
    torch.complex128: {"rtol": 1e-12, "atol": 1e-13},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}

TORCH_TWIN: dict[type[Optimizer], type[Optimizer]] = {
    effkern.FusedAdam: torch.optim.Adam,
    effkern.FusedAdamW: torch.optim.AdamW,
    effkern.FusedSGD: torch.optim.SGD,
    effkern.FusedAdagrad: torch.optim.Adagrad,
    effkern.FusedRMSprop: torch.optim.RMSprop,
    effkern.FusedAdadelta: torch.optim.Adadelta,
}
ADAMS = (effkern.FusedAdam, effkern.FusedAdamW)

#: Every class of effkern, with what it must agree with.
TWIN: dict[type[Optimizer], type[Optimizer]] = {
    **TORCH_TWIN,
    effkern.FusedLion: oracles.Lion,
    effkern.FusedLAMB: oracles.Lamb,
}


class Twins:
    """The same parameters twice: effkern updates ``mine``, PyTorch ``theirs``, in float64.

    Args:
        params: parameters, on any device, of any strides; or parameter groups of such.
        kind: effkern's class.
        options: of both optimizers.
    """

    def __init__(
        self,
        params: Sequence[Tensor] | Sequence[dict[str, Any]],
        kind: type[Optimizer] = effkern.FusedAdamW,
        **options: Any,
    ) -> None:
        groups = [dict(g) if isinstance(g, dict) else {"params": [g]} for g in params]
        if not isinstance(params[0], dict):
            groups = [{"params": list(params)}]
        for group in groups:
            group["params"] = [
                p if isinstance(p, torch.nn.Parameter) else torch.nn.Parameter(p)
                for p in group["params"]
            ]
        wide = [{**group, "params": [_double(p) for p in group["params"]]} for group in groups]
        self.optimizer = kind(groups, **options)
        self.twin = TWIN[kind](wide, foreach=False, **options)
        #: A dtype narrower than that of the parameters, where earlier steps were taken in it.
        self.started_in: torch.dtype | None = None

    @property
    def mine(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def theirs(self) -> list[Tensor]:
        return [p for group in self.twin.param_groups for p in group["params"]]

    def both(self, change: Callable[[torch.optim.Optimizer], Any]) -> None:
        """Do the same to both optimizers."""
        change(self.optimizer)
        change(self.twin)

    def new_grads(self, which: Sequence[int] | None = None) -> None:
        """Random gradients, in the order of memory of the parameters.

        Args:
            which: parameters that get one; the others get None. By default all.
        """
        for i, (mine, theirs) in enumerate(zip(self.mine, self.theirs, strict=True)):
            if which is not None and i not in which:
                mine.grad = theirs.grad = None
                continue
            random = torch.randn(mine.shape, dtype=_random_dtype(mine))
            mine.grad = torch.empty_like(mine).copy_(random)
            theirs.grad = mine.grad.to("cpu", theirs.dtype, copy=True)

    def step(self, which: Sequence[int] | None = None) -> None:
        """New gradients, a step of both, and a comparison."""
        self.new_grads(which)
        self.both(lambda optimizer: optimizer.step())
        self.check()

    def check(self) -> None:
        """Fail unless parameters, states and step counters agree."""
        for i, (mine, theirs) in enumerate(zip(self.mine, self.theirs, strict=True)):
            self._assert_close(mine, theirs, f"parameter {i}")
            my_state, their_state = self.optimizer.state.get(mine), self.twin.state.get(theirs)
            assert (my_state is None) == (their_state is None), f"state of parameter {i}"
            if my_state is None:
                continue
            assert list(my_state) == list(their_state)
            for name, value in my_state.items():
                self._assert_close(value, their_state[name], f"{name} of parameter {i}")

    def _assert_close(self, mine: Tensor, theirs: Tensor, what: str) -> None:
        narrowest = min(mine.dtype, self.started_in or mine.dtype, key=lambda d: d.itemsize)
        wide = theirs.dtype
        torch.testing.assert_close(
            mine.detach().cpu().to(wide),
            theirs.detach(),
            **_TOLERANCES[narrowest],
            msg=lambda text: f"{what}: {text}",
        )


def _random_dtype(param: Tensor) -> torch.dtype:
    return torch.complex64 if param.is_complex() else torch.float32


def _double(param: Tensor) -> torch.nn.Parameter:
    """A float64 copy on the CPU, with the same strides."""
    values = param.detach().cpu()
    dtype = torch.complex128 if param.is_complex() else torch.float64
    wide = torch.empty_strided(values.shape, values.stride(), dtype=dtype)
    return torch.nn.Parameter(wide.copy_(values), requires_grad=param.requires_grad)
