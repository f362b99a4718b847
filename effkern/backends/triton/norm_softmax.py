"""The ops of NormSoftmax in Triton: checks, tiles and launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from effkern.backends.triton.checks import check_device, check_dtype, check_like
from effkern.backends.triton.launch import COMPILER_OPTIONS, device_guard
from effkern.backends.triton.norm_kernels import tile_for
from effkern.backends.triton.norm_softmax_kernels import (
    ADDITIVE,
    BOOLEAN,
    NO_MASK,
    norm_softmax_backward_kernel,
    norm_softmax_backward_long_kernel,
    norm_softmax_forward_kernel,
    norm_softmax_forward_long_kernel,
)
from effkern.backends.triton.numerics import TRITON_DTYPE, accumulation_dtype
from effkern.backends.triton.rows import RowLayout, row_layout

#: The longest row that is read once, in bytes of the accumulation type: 16,384 float32 elements
#: forward, 8,192 with an additive mask and backward.
FORWARD_ROW_BYTES, HALF_ROW_BYTES = 64 * 1024, 32 * 1024


def forward(
    x: Tensor, mask: Tensor | None, tau: Tensor | None, tau_value: float, eps: float, dim: int
) -> Tensor:
    """The op ``effkern::_norm_softmax_forward``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with device_guard(x, "_norm_softmax_forward"):
        call = _call(x, mask, tau, tau_value, eps, dim)
        if y.numel():
            _launch(
                (norm_softmax_forward_kernel, norm_softmax_forward_long_kernel),
                [],
                [call.of(y)],
                call,
                HALF_ROW_BYTES if call.options["KIND"] == ADDITIVE else FORWARD_ROW_BYTES,
            )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    eps: float,
    dim: int,
    wants_x: bool,
    wants_tau: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``effkern::_norm_softmax_backward``."""
    check_like(grad, "grad", x, "x")
    grad_x = torch.empty(x.shape if wants_x else 0, dtype=x.dtype, device=x.device)
    with device_guard(x, "_norm_softmax_backward"):
        call = _call(x, mask, tau, tau_value, eps, dim)
        shares = call.rows if wants_tau else 0
        grad_tau = torch.empty(shares, dtype=accumulation_dtype(x.dtype), device=x.device)
        if not x.numel():
            return grad_x, grad_tau.zero_()
        _launch(
            (norm_softmax_backward_kernel, norm_softmax_backward_long_kernel),
            [call.of(grad)],
            [call.of(grad_x) if wants_x else None, grad_tau if wants_tau else None],
            call,
            HALF_ROW_BYTES,
        )
    return grad_x, grad_tau


class _Rows(NamedTuple):
    """A tensor as rows whose elements may be strided."""

    tensor: Tensor
    layout: RowLayout
    stride: int


class _Call(NamedTuple):
    """What both passes are called with.

    Attributes:
        shape: of x, with one dimension at least.
        dim: along which the rows lie.
        x: its rows.
        mask: the mask's, or None.
        tau: one number of the accumulation dtype, or None.
        numbers: the value of tau, eps, and what an additive mask hides.
        options: compile-time constants.
    """

    shape: torch.Size
    dim: int
    x: _Rows
    mask: _Rows | None
    tau: Tensor | None
    numbers: tuple[float, float, float]
    options: dict[str, Any]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[: self.dim]) * math.prod(self.shape[self.dim + 1 :])

    @property
    def features(self) -> int:
        return self.shape[self.dim]

    def of(self, tensor: Tensor) -> _Rows:
        """The rows of another tensor, broadcast to x's shape."""
        return _rows_of(tensor, self.shape, self.dim)


def _call(
    x: Tensor, mask: Tensor | None, tau: Tensor | None, tau_value: float, eps: float, dim: int
) -> _Call:
    check_dtype(x, "x")
    acc = accumulation_dtype(x.dtype)
    shape = x.shape or torch.Size([1])
    if not 0 <= dim < len(shape):
        raise RuntimeError(f"dim is {dim}; it must be from 0 to {len(shape) - 1}, a dimension of x")
    kind, hidden = NO_MASK, 0.0
    if mask is not None:
        check_device(mask, "mask", x, "x")
        if mask.dtype not in (torch.bool, x.dtype, acc):
            raise RuntimeError("mask must be bool, of x's dtype or of the accumulation type")
        kind = BOOLEAN
        if mask.dtype != torch.bool:
            kind, hidden = ADDITIVE, torch.finfo(mask.dtype).min / 2
    if tau is not None:
        check_device(tau, "tau", x, "x")
        if tau.dtype != acc or tau.numel() != 1:
            raise RuntimeError("tau must be one number of the accumulation type")
    return _Call(
        shape,
        dim,
        _rows_of(x, shape, dim),
        None if mask is None else _rows_of(mask, shape, dim),
        tau,
        (tau_value, eps, hidden),
        {"KIND": kind, "ACC": TRITON_DTYPE[acc]},
    )


def _rows_of(tensor: Tensor, shape: torch.Size, dim: int) -> _Rows:
    """The rows of a tensor that is broadcast to ``shape``; of a copy where they do not do."""
    view = tensor.expand(shape).movedim(dim, -1)
    if not view.numel():
        return _Rows(view, (1, 1, 0, 0, 0), 1)
    layout = row_layout(view[..., 0], 0)
    if layout is None:
        view = view.contiguous()
        layout = row_layout(view[..., 0], 0)
        assert layout is not None
    if view.dtype == torch.bool:
        view = view.view(torch.uint8)
    return _Rows(view, layout, view.stride(-1))


def _launch(
    kernels: tuple[Any, Any],
    inputs: list[_Rows],
    outputs: list[Any],
    call: _Call,
    row_bytes: int,
) -> None:
    """Start the kernel for rows that fit in ``row_bytes``, or the one for longer rows.

    Args:
        kernels: those two.
        inputs: beside x and the mask.
        outputs: rows, or a tensor, or None for one that is not wanted.
        call: the rest.
        row_bytes: of the accumulation type.
    """
    kernel, long_kernel = kernels
    of_outputs = [each for each in outputs if not isinstance(each, Tensor)][:1]
    every = [*inputs, call.x, call.mask, *of_outputs]
    tensors = [each and each.tensor for each in [*inputs, call.x, call.mask]]
    results = [each.tensor if isinstance(each, _Rows) else each for each in outputs]
    tile = tile_for(call.features, accumulation_dtype(call.x.tensor.dtype), row_bytes)
    arguments = [
        *tensors,
        call.tau,
        *results,
        *(each and each.layout for each in every),
        *(1 if each is None else each.stride for each in every),
        call.rows,
        call.features,
        *call.numbers,
    ]
    options = {
        **call.options,
        "BLOCK": tile.block,
        "num_warps": tile.warps,
        **COMPILER_OPTIONS,
    }
    if tile.columns == 1:
        kernel[(triton.cdiv(call.rows, tile.rows),)](*arguments, ROWS=tile.rows, **options)
    else:
        long_kernel[(call.rows,)](*arguments, **options)
