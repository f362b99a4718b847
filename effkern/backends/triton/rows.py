"""A tensor seen as rows of contiguous features, where the rows themselves may be strided.

As in csrc/common/rows.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: size1, size2, stride0, stride1, stride2: extents of the middle and the innermost of three leading
#: dimensions and the strides of all three, in elements.
RowLayout = tuple[int, int, int, int, int]


def as_rows(x: torch.Tensor, dims: int) -> tuple[torch.Tensor, RowLayout]:
    """``x``, copied if need be, and its layout as rows of its last ``dims`` dimensions."""
    layout = row_layout(x, dims)
    if layout is None:
        x = x.contiguous()
        layout = row_layout(x, dims)
        assert layout is not None
    return x, layout


def optional_rows(
    x: torch.Tensor | None, dims: int
) -> tuple[torch.Tensor, RowLayout] | tuple[None, None]:
    """The same for an argument that may be None."""
    return (None, None) if x is None else as_rows(x, dims)


def row_layout(x: torch.Tensor, dims: int) -> RowLayout | None:
    """None if the last ``dims`` dimensions are not dense or the others do not collapse to three."""
    split = x.dim() - dims
    features = 1
    for size, stride in zip(reversed(x.shape[split:]), reversed(x.stride()[split:]), strict=True):
        if size != 1 and stride != features:
            return None
        features *= size

    leading: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:split], x.stride()[:split], strict=True):
        if size == 1:
            continue
        if leading and leading[-1][1] == stride * size:
            leading[-1] = (leading[-1][0] * size, stride)
        else:
            leading.append((size, stride))
    if len(leading) > 3:
        return None
    # Missing dimensions go inside, with extent 1: one dimension then needs row * stride0 alone. A
    # single row passes for one of many, so that it is compiled and summed as they are.
    leading = leading or [(1, features)]
    (_, stride0), (size1, stride1), (size2, stride2) = leading + [(1, 0)] * (3 - len(leading))
    return size1, size2, stride0, stride1, stride2


@triton.jit
def row_offset(row, layout):
    """Elements from the first row to ``row`` (int64)."""
    size1, size2, stride0, stride1, stride2 = layout
    row = row.to(tl.int64)
    # An extent of 1 is a compile-time constant in compiled code, and so is this branch.
    if size1 == 1 and size2 == 1:
        offset = row * stride0
    else:
        rest = row // size2
        offset = rest // size1 * stride0 + rest % size1 * stride1 + row % size2 * stride2
    return offset
