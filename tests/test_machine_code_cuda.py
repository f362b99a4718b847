"""What nvcc makes of the CUDA kernels: no spills, no local memory, 16-byte accesses, registers that
leave room for the threads that each source states.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from effkern.bench import machine_code
from effkern.bench.machine_code import ARCHITECTURES, Row

pytestmark = pytest.mark.skipif(
    bool(machine_code.why_no_cuda()), reason=machine_code.why_no_cuda() or "-"
)

#: Registers of a multiprocessor.
REGISTERS = 65536

#: Of NormSoftmax, where a block takes a row.
LONG_ROWS = ("softmax_long", "softmax_backward_long", "cross_entropy_kernel")


#: The update rules' variants, as the kernels' template arguments begin.
VARIANTS = {"Adam": 2, "Sgd": 2, "Adagrad": 1, "RmsProp": 4, "Adadelta": 1, "Lion": 1}
#: Those that keep three states.
THREE_STATES = (["Adam", "1"], ["RmsProp", "3"])


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return machine_code.cuda_rows()


def arguments(row: Row) -> tuple[str, list[str]]:
    """The kernel's name and template arguments."""
    match = re.fullmatch(r"cuda (\w+)<(.*)>", row.kernel)
    assert match, row.kernel
    return match[1], match[2].split(", ")


def threads(row: Row) -> int:
    """Threads a multiprocessor, as the kernels' sources state them."""
    name, rest = arguments(row)
    if name in ("mixed_kernel", "lamb_advance_mixed", "lamb_apply_mixed"):
        return 256 * (2 if rest[:2] in THREE_STATES else 3)
    if name == "squares_kernel":
        return 1024
    if name in ("step_kernel", "lamb_advance", "lamb_apply"):
        more = name == "lamb_advance" or rest[:2] in THREE_STATES
        narrow = rest[-1] not in ("float", "double")
        return 256 * (2 if rest[-1] == "double" else 4 - (narrow and more))
    if name == "softmax_held":
        return 512 if rest[-1] == "true" else 1024
    return 512 if name in ("backward_held", "softmax_backward_held") else 1024


def test_every_instance_is_there(rows: list[Row]) -> None:
    names = [arguments(row)[0] for row in rows]
    counts = {name: names.count(name) / len(ARCHITECTURES) for name in names}
    variants = sum(VARIANTS.values())
    expected = {"step_kernel": 4 * variants, "lamb_advance": 4, "lamb_apply": 4}
    # With states in 8 bits and without; one variant of SGD keeps none.
    expected |= {"mixed_kernel": 2 * variants - 1, "lamb_advance_mixed": 2, "lamb_apply_mixed": 2}
    expected |= {"squares_kernel": 4}
    # Of each norm and dtype, aligned and not.
    of_norms = ("forward_held", "forward_twice", "backward_held", "project", "apply")
    expected |= dict.fromkeys(of_norms, 3 * 4 * 2) | {"sum_shares_kernel": 4}
    # Of each dtype, aligned and not; of rows held there is one more with an additive mask.
    expected |= dict.fromkeys(LONG_ROWS, 4 * 2)
    expected |= {"softmax_held": 4 * 2 * 2, "softmax_backward_held": 4 * 2}
    assert counts == expected
    for kernel in ("step_kernel", "mixed_kernel"):
        found = {tuple(rest) for name, rest in map(arguments, rows) if name == kernel}
        for rule, count in VARIANTS.items():
            assert {rest[1] for rest in found if rest[0] == rule} == set(map(str, range(count)))


#: Of NormSoftmax's kernels some instances have a small stack frame: still to be taken away.
WITH_A_FRAME = ("softmax_long", "softmax_held", "softmax_backward_long", "cross_entropy_kernel")


def test_nothing_spills_and_nothing_is_local(rows: list[Row]) -> None:
    found = [row for row in rows if row.spill_bytes or row.local_bytes]
    assert {arguments(row)[0] for row in found} <= set(WITH_A_FRAME)
    assert all(row.local_bytes <= 56 for row in found)


def test_the_aligned_path_moves_16_bytes_at_a_time(rows: list[Row]) -> None:
    for row in rows:
        name, rest = arguments(row)
        one_by_one = name.startswith(("forward", "backward", "project", "apply")) and rest[2] == "1"
        one_by_one |= name.startswith(("softmax", "cross_entropy")) and rest[1] == "1"
        if name == "sum_shares_kernel" or one_by_one:
            continue
        assert row.vector_loads, row
        # A number a row, or a block, is all that these write.
        assert row.vector_stores or name in ("project", "squares_kernel"), row


def test_registers_leave_room_for_the_threads_that_are_stated(rows: list[Row]) -> None:
    for row in rows:
        assert row.registers * threads(row) <= REGISTERS, row


def test_adam_in_float32_takes_at_most_64_registers(rows: list[Row]) -> None:
    of_adam = [row for row in rows if re.search(r"<Adam, \d, float>", row.kernel)]
    assert len(of_adam) == 2 * len(ARCHITECTURES)
    assert [row for row in of_adam if row.registers > 64] == []


def test_shared_memory_is_all_dynamic(rows: list[Row]) -> None:
    """So that tests/simt gives each launch its exact size."""
    assert [row for row in rows if row.shared_bytes] == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_spilling_kernel_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) many(float* p) {\n"
        "  float a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[i] = p[i];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 64; ++i) p[threadIdx.x * 64 + i] = a[i] * a[63 - i];\n"
        "  p[0] = a[threadIdx.x % 64];\n"
        "}\n"
    )
    cubin = tmp_path / "spilling.cubin"
    subprocess.run(["nvcc", "-cubin", "-arch=sm_90", source, "-o", cubin], check=True)
    (row,) = machine_code.cubin_rows(cubin, 90)
    assert row.spill_bytes or row.local_bytes
    assert not row.vector_loads
