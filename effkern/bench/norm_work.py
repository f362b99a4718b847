"""The work of ``effkern bench norms``: what a norm is called on, and what of it is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effkern.bench.limits import Streams
from effkern.bench.peers import Norm
from effkern.bench.timers import Contestant, Rotation

#: What is timed, and the passes over row-sized buffers that it cannot do without, by whether there
#: is a residual. Forward reads x (and the residual) and writes y (and the sum); backward reads the
#: gradient (and that of the sum) and the normalised input, and writes the input's gradient, which
#: the residual shares.
MODES: dict[str, dict[bool, tuple[Streams, ...]]] = {
    "forward": {False: (Streams(1, 1),), True: (Streams(2, 2),)},
    "backward": {False: (Streams(2, 1),), True: (Streams(3, 1),)},
    "forward + backward": {
        False: (Streams(1, 1), Streams(2, 1)),
        True: (Streams(2, 2), Streams(3, 1)),
    },
}


@dataclass(frozen=True)
class Buffers:
    """One call's inputs and the gradients of its outputs, each (rows, hidden size).

    Attributes:
        x: the input.
        residual: added to it, or None.
        grads: of y and, with a residual, of the sum.
    """

    x: Tensor
    residual: Tensor | None
    grads: tuple[Tensor, ...]


class NormWork:
    """Random inputs of one shape, and the contestants that work on them."""

    def __init__(
        self,
        rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        parameters: int,
        with_residual: bool,
        seed: int,
    ) -> None:
        """Random tensors; ``parameters``: how many the norm takes, of the hidden size each."""
        self.rows, self.hidden_size = rows, hidden_size
        self.dtype, self.device = dtype, device
        self.with_residual = with_residual
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._parameters = tuple(
            self._random(hidden_size).requires_grad_() for _ in range(parameters)
        )
        buffers = 4 if with_residual else 2
        self._rotation = Rotation(self._make_buffers, set_bytes=buffers * self.buffer_bytes)

    @property
    def buffer_bytes(self) -> int:
        """Of one buffer of (rows, hidden size)."""
        return self.elements * self.dtype.itemsize

    @property
    def elements(self) -> int:
        """Of one such buffer."""
        return self.rows * self.hidden_size

    def passes(self, mode: str) -> tuple[Streams, ...]:
        """The least that ``mode`` must read and write."""
        return MODES[mode][self.with_residual]

    def contestant(self, mode: str, norm: Norm) -> Contestant:
        """``norm`` at a mode of `MODES`, on the next buffers each time."""
        if mode == "forward":
            return Contestant(lambda buffers: self._forward_alone(norm, buffers), self._rotation)
        if mode == "backward":
            return Contestant(
                lambda graph: self._backward(*graph), lambda: self._graph(norm, self._rotation())
            )
        return Contestant(
            lambda buffers: self._backward(*self._graph(norm, buffers)), self._rotation
        )

    def _forward_alone(self, norm: Norm, buffers: Buffers) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return norm(buffers.x, self._parameters, buffers.residual)

    def _graph(self, norm: Norm, buffers: Buffers) -> tuple[Buffers, tuple[Tensor, ...]]:
        return buffers, norm(buffers.x, self._parameters, buffers.residual)

    def _backward(self, buffers: Buffers, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = [buffers.x, *self._parameters]
        if buffers.residual is not None:
            inputs.append(buffers.residual)
        # The outputs stay until the clock has stopped, as a network keeps them.
        return outputs + torch.autograd.grad(outputs, inputs, buffers.grads)

    def _make_buffers(self) -> Buffers:
        def make() -> Tensor:
            return self._random(self.rows, self.hidden_size)

        x = make().requires_grad_()
        if not self.with_residual:
            return Buffers(x, None, (make(),))
        return Buffers(x, make().requires_grad_(), (make(), make()))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=self.dtype, device=self.device)
