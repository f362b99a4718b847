"""The table of a multi-tensor step, as csrc/common/multi_tensor.h lays it out.

One row of int64 for each tensor; one row of int32 for each block of GPU work.
"""

from __future__ import annotations

import torch

(
    NUMEL,
    PARAM,
    GRAD,
    STATE0,
    STATE1,
    STATE2,
    STEP,
    STEPS,
    TICKET,
    RATIO,
    MASTER,
    SCALE0,
    SCALE1,
    SCALE2,
    KEY,
    _UNUSED,
    COLUMNS,
) = range(17)

#: Elements in one block of GPU work.
CHUNK = 8192

#: Storage dtypes of the kernels, in the order of their codes in csrc/common/dtype.h.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: How states may be stored, in the order of ``StateType``: as the parameter, or as one of these.
STATE_TYPES = ("as param", torch.float32, torch.bfloat16, "int8")

#: Values of a state in 8 bits that share a scale.
QUANTIZED_BLOCK = 256
