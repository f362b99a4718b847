"""The op by which a compiled graph takes a step."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import effkern

op = torch.ops.effkern._deferred_step_.default


def arguments(optimizer: Any, which: list[int]) -> tuple[Any, ...]:
    params = optimizer.param_groups[0]["params"]
    chosen = [params[i] for i in which]
    state = [optimizer.state[p] for p in chosen]
    lists = [[s[key] for s in state] for key in ("exp_avg", "exp_avg_sq", "step")]
    states, steps = lists[0] + lists[1], lists[2]
    return (
        optimizer._name,
        0,
        which,
        "",
        [p.detach() for p in chosen],
        [p.grad for p in chosen],
        states,
        steps,
        [],
        [],
    )


def stepped(**options: Any) -> Any:
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((3,), (2, 4), ())]
    optimizer = effkern.FusedAdam(params, lr=0.1, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def test_opcheck() -> None:
    optimizer = stepped(max_grad_norm=0.5)
    numbers = {
        "lr_tensor": torch.tensor(0.1),
        "grad_scale": torch.tensor(2.0),
        "found_inf": torch.tensor(0.0),
        "squares": torch.tensor([2.0, 3.0], dtype=torch.float64),
    }
    torch.library.opcheck(op, arguments(optimizer, [0, 2]))
    torch.library.opcheck(op, arguments(optimizer, [0, 1, 2]), numbers)


def test_it_raises_version_counters() -> None:
    optimizer = stepped()
    passed = arguments(optimizer, [0, 1])
    written = [t for i in (4, 6, 7) for t in passed[i]]
    before = [t._version for t in written]
    op(*passed)
    assert all(t._version > was for t, was in zip(written, before, strict=True))


def test_inductor_may_not_capture_it() -> None:
    """On a GPU it sends a table from host memory that is gone when a CUDA graph is replayed."""
    listed = [op, torch.ops.effkern._squares_.default, torch.ops.effkern._lamb_.default]
    assert all(torch.Tag.cudagraph_unsafe in one.tags for one in listed)


def test_an_optimizer_that_is_gone() -> None:
    optimizer = stepped()
    passed = arguments(optimizer, [0])
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="the optimizer whose step was compiled is gone"):
        op(*passed)
