"""What Triton's compiler makes of the kernels for sm_80, sm_90 and sm_100; no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from effkern.bench.machine_code import ARCHITECTURES, Row, why_no_triton

pytestmark = pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton())

#: These write a few numbers a row, one row or one number in all, or states in 8 bits alone.
WRITES_LITTLE = ("norm_projection", "norm_sum_shares", "squares")
WRITES_NARROW = "triton lamb_advance float32, int8"

#: Compiled for each architecture; the rest for one, for the sake of time. The whole table is that
#: of `python -m effkern.bench.machine_code`.
EVERYWHERE = {
    ("adam", "float32"),
    ("adam", "float32 amsgrad"),
    ("adam", "float32 on the device"),
    ("rmsprop", "float32"),
    ("lamb", "float32 on the device"),
    ("adam", "float32, int8"),
    ("adam", "bfloat16, float32, masters"),
    ("rms_norm_forward", "rms_norm float32 x 16384"),
    ("rms_norm_backward", "rms_norm float32 x 8192"),
    ("layer_norm_forward", "layer_norm float32 x 16384"),
    ("layer_norm_backward", "layer_norm float32 x 8192"),
}
ONE = 90


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    from effkern.backends.triton import machine_code

    chosen = [path for path in machine_code.main_paths() if path[:2] in EVERYWHERE]
    assert len(chosen) == len(EVERYWHERE)
    others = [arch for arch in ARCHITECTURES if arch != ONE]
    found = [*machine_code.rows([ONE]), *machine_code.rows(others, chosen)]
    return [Row(**row) for row in found]


def family(row: Row) -> str:
    """The kernel without the rest: a row is named "triton norm_forward rms_norm float32"."""
    return row.kernel.split()[1]


def test_every_kernel_is_there(rows: list[Row]) -> None:
    from effkern.backends.triton import norm_kernels
    from effkern.backends.triton.rules import RULES

    kernels = {
        name.removesuffix("_kernel") for name in vars(norm_kernels) if name.endswith("_kernel")
    }
    softmax = {f"norm_softmax_{name}" for name in ("forward", "backward")}
    kernels |= softmax | {f"{name}_long" for name in softmax} | {"cross_entropy"}
    kernels |= {f"{rule}_update" for rule in RULES} | {"lamb_advance", "squares"}
    assert {family(row) for row in rows} == kernels
    assert {row.arch for row in rows} == set(ARCHITECTURES)


def test_nothing_spills(rows: list[Row]) -> None:
    assert [row for row in rows if row.spill_bytes or row.local_bytes] == []


def test_the_main_path_moves_16_bytes_at_a_time(rows: list[Row]) -> None:
    assert [row for row in rows if not row.vector_loads] == []
    little = (*WRITES_LITTLE, WRITES_NARROW)
    main = [row for row in rows if family(row) not in little and row.kernel not in little]
    assert [row for row in main if not row.vector_stores] == []


def test_registers_allow_the_occupancy_that_the_kernels_state(rows: list[Row]) -> None:
    for row in rows:
        if ", int8" in row.kernel:
            assert row.registers <= 96, row  # eight elements a thread
        elif family(row).endswith(("_update", "_advance")) or family(row) == "squares":
            assert row.registers <= 64, row
        elif family(row) == "norm_forward":
            assert row.registers <= 64, row  # up to 1,024 threads a program
        elif family(row) == "norm_backward" or family(row).startswith("norm_softmax_"):
            assert row.registers <= 128, row  # up to 512 threads a program


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        pytest.param((1,), (1,), id="one element"),
        pytest.param((1, 64), (64, 1), id="one row"),
        pytest.param((7, 3), (3, 1), id="odd"),
        pytest.param((5, 4, 3, 8), (7, 41, 1000, 1), id="three strides"),
        pytest.param((3, 4096), (0, 1), id="expanded"),
        pytest.param((2, 8193), (8193, 1), id="long and odd"),
    ],
)
def test_what_a_launch_may_specialise_compiles(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    """Triton compiles integers that are 1, and None, as constants: each is another program."""
    from effkern.backends.triton.machine_code import compile_for, record
    from effkern.backends.triton.norm import (
        layer_norm_backward,
        layer_norm_forward,
        rms_norm_backward,
        rms_norm_forward,
    )

    x = torch.empty_strided(shape, strides, device="meta")
    rstd = torch.empty(shape[:-1], device="meta")
    weight = torch.empty(shape[-1], dtype=torch.float16, device="meta")

    def calls() -> None:
        rms_norm_forward(x, None, weight, None, 1, 1e-6)
        rms_norm_forward(x, x, None, None, 1, 1e-6)
        rms_norm_backward(x, None, x, None, rstd, 1, True, False, False)
        rms_norm_backward(x, x, x, weight, rstd, 1, False, True, False)
        rms_norm_backward(x, None, x, weight, rstd, 1, True, True, True, True, weight)
        kept = torch.stack((rstd, rstd))
        layer_norm_forward(x, x, weight, weight, 1, 1e-6)
        layer_norm_backward(x, x, x, weight, kept, 1, True, False, True)
        layer_norm_backward(x, None, x, None, kept, 1, True, False, False)
        layer_norm_backward(x, None, x, None, kept, 1, True, False, False, True)

    launches = record(calls)
    assert len(launches) >= 10
    for launch in launches:
        assert compile_for(launch, 90).asm["cubin"]
