"""What Triton's compiler makes of each kernel, for GPUs that need not be there.

The ops are called with tensors that have no memory; their launches are recorded instead of run, and
each is compiled as it would have been. Not to be had under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from effkern.backends.table import QUANTIZED_BLOCK
from effkern.backends.triton import norm as norms
from effkern.backends.triton import norm_softmax, norm_softmax_cross_entropy
from effkern.backends.triton.numerics import TRITON_DTYPE
from effkern.backends.triton.rules import RULES
from effkern.backends.triton.squares import squares_
from effkern.backends.triton.step import step_

ARCHITECTURES = (80, 90, 100)

_ROWS = 4096


class Launch(NamedTuple):
    """One launch as an op asked for it: the kernel's positional arguments, and its options."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Path(NamedTuple):
    """A call of an op: what it is called with besides the op's name, and the call."""

    op: str
    case: str
    call: Callable[[], None]


def rows(
    architectures: Sequence[int] = ARCHITECTURES, paths: Iterable[Path] | None = None
) -> list[dict[str, Any]]:
    """The resources of every kernel on every architecture.

    Args:
        architectures: for example 90 for sm_90.
        paths: calls that launch the kernels; `main_paths` if None.

    Returns:
        For each: kernel, arch, registers (a thread's), spill_bytes, local_bytes (a thread's),
        shared_bytes (a program's), vector_loads and vector_stores (whether any have 16 bytes).
    """
    found = []
    seen = set()
    with ThreadPoolExecutor(max_workers=2) as pool:  # disassembles while this thread compiles
        for path in main_paths() if paths is None else paths:
            for launch in record(path.call):
                source = _source(launch).hash()
                if source in seen:
                    continue  # another length of row, but the same kernel
                seen.add(source)
                for arch in architectures:
                    compiled = compile_for(launch, arch)
                    name = compiled.metadata.name.removesuffix("_kernel")
                    kernel = f"triton {name} {path.case}"
                    found.append((kernel, arch, pool.submit(_resources, compiled)))
    return [{"kernel": kernel, "arch": arch, **row.result()} for kernel, arch, row in found]


def main_paths() -> Iterator[Path]:
    """Calls that between them launch every kernel."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield Path("adam", name, partial(_step, "adam", dtype))
        yield Path("adam", f"{name} amsgrad", partial(_step, "adam", dtype, amsgrad=True))
        for norm in ("rms_norm", "crms_norm", "layer_norm"):
            for features in (768, 16384, 65536):
                forward = partial(_norm_forward, norm, dtype, features)
                yield Path(f"{norm}_forward", f"{norm} {name} x {features}", forward)
            for features in (768, 8192, 16384):
                backward = partial(_norm_backward, norm, dtype, features)
                yield Path(f"{norm}_backward", f"{norm} {name} x {features}", backward)
    yield from _norm_softmax_paths()
    for rule in RULES:
        if rule != "adam":
            yield Path(rule, "float32", partial(_step, rule, torch.float32))
    for rule in ("adam", "lamb"):
        call = partial(_step, rule, torch.float32, on_device=True)
        yield Path(rule, "float32 on the device", call)
        yield Path(rule, "float32, int8", partial(_mixed_step, rule, torch.float32, "int8"))
    for state in (torch.float32, "int8"):
        name = str(state).removeprefix("torch.")
        call = partial(_mixed_step, "adam", torch.bfloat16, state, masters=True)
        yield Path("adam", f"bfloat16, {name}, masters", call)
    call = partial(_mixed_step, "adam", torch.bfloat16, "int8", stochastic=True)
    yield Path("adam", "bfloat16, int8, stochastic", call)
    yield Path("squares", "float32", _squares)


def _norm_softmax_paths() -> Iterator[Path]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for features, has_mask in ((16384, False), (8192, True), (65536, False)):
            mask = ", mask" if has_mask else ""
            forward = partial(_norm_softmax, dtype, features, has_mask, False)
            yield Path("norm_softmax_forward", f"{name} x {features}{mask}", forward)
        for features, has_mask in ((8192, True), (65536, False)):
            mask = ", mask" if has_mask else ""
            backward = partial(_norm_softmax, dtype, features, has_mask, True)
            yield Path("norm_softmax_backward", f"{name} x {features}{mask}", backward)
        call = partial(_cross_entropy, dtype)
        yield Path("norm_softmax_cross_entropy", f"{name} x 50304", call)


def record(call: Callable[[], None]) -> list[Launch]:
    """The launches that ``call`` asks for; none is run."""
    launches = []

    def run(self: JITFunction, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, arguments, options))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return launches


def compile_for(launch: Launch, arch: int) -> CompiledKernel:
    """The kernel as the launch would have compiled it on ``sm_{arch}``."""
    names = {param.name for param in launch.kernel.params}
    options = {name: value for name, value in launch.options.items() if name not in names}
    return triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=options)


def _resources(compiled: CompiledKernel) -> dict[str, Any]:
    usage, assembly = _disassemble(compiled.asm["cubin"])
    sizes = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(sizes["REG"]),
        "spill_bytes": int(sizes["STACK"]),
        "local_bytes": int(sizes["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "vector_loads": re.search(r"\bLDG\.[\w.]*128", assembly) is not None,
        "vector_stores": re.search(r"\bSTG\.[\w.]*128", assembly) is not None,
    }


def _source(launch: Launch) -> ASTSource:
    """The kernel specialised as a launch specialises it: integers that are 1, multiples of 16."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, place: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(each, (*place, index)) for index, each in enumerate(value))
        if value is None or value == 1:
            constants[place] = value
            return "constexpr"
        if isinstance(value, int):
            if value % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
            return "i32" if abs(value) < 2**31 else "i64"
        raise TypeError(f"no type for {value!r}")

    for index, param in enumerate(launch.kernel.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[(index,)] = launch.options[param.name]
            continue
        value = launch.arguments[index]
        if isinstance(value, torch.Tensor):
            attributes[(index,)] = [["tt.divisibility", 16]]
            signature[param.name] = _POINTERS[value.dtype]
        else:
            signature[param.name] = param.annotation_type or type_of(value, (index,))
    return ASTSource(launch.kernel, signature, constants, attributes)


_POINTERS = {torch.int32: "*i32", torch.int64: "*i64"} | {
    dtype: f"*{triton_dtype}" for dtype, triton_dtype in TRITON_DTYPE.items()
}


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and instructions, by the tools that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        assembly = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        usage_text, assembly_text = (
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for command in (usage, assembly)
        )
    return usage_text, assembly_text


#: Every option of every rule; those that keep a state are on, but for AMSGrad.
_OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "decoupled": True,
        "amsgrad": False,
        "maximize": False,
        "bias_correction": True,
    },
    "sgd": {
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 1e-2,
        "nesterov": True,
        "maximize": False,
    },
    "adagrad": {"lr_decay": 0.1, "eps": 1e-10, "weight_decay": 1e-2, "maximize": False},
    "rmsprop": {
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "momentum": 0.9,
        "centered": True,
        "maximize": False,
    },
    "adadelta": {"rho": 0.9, "eps": 1e-6, "weight_decay": 1e-2, "maximize": False},
    "lion": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 1e-2, "maximize": False},
    "lamb": {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-6,
        "weight_decay": 1e-2,
        "maximize": False,
    },
}


def _step(rule: str, dtype: torch.dtype, *, on_device: bool = False, **changed: Any) -> None:
    """``on_device``: step counter, learning rate and what torch.amp.GradScaler gives."""
    tensors = [torch.empty(4096, dtype=dtype, device="meta")]
    number = torch.empty((), device="meta") if on_device else None
    step_(
        rule,
        tensors,
        tensors,
        *[tensors] * len(RULES[rule].states),
        [torch.zeros(()) if number is None else number],
        [],
        [],
        [],
        lr=1e-3,
        lr_tensor=number,
        grad_scale=number,
        found_inf=number,
        **(_OPTIONS[rule] | changed),
    )


def _mixed_step(
    rule: str,
    dtype: torch.dtype,
    state: torch.dtype | str,
    *,
    masters: bool = False,
    stochastic: bool = False,
) -> None:
    """With gradients clipped; ``state``: a dtype, or "int8"."""
    options = _OPTIONS[rule]
    kept = RULES[rule].form(**options).kept
    param = torch.empty(4096, dtype=dtype, device="meta")
    states = []
    for keep, signed in zip(kept, RULES[rule].states.values(), strict=True):
        code = torch.int8 if signed else torch.uint8
        of_state = code if isinstance(state, str) else state
        states.append([torch.empty_like(param, dtype=of_state)] if keep else [])
    scales = torch.empty(4096 // QUANTIZED_BLOCK, device="meta")
    step_(
        rule,
        [param],
        [param],
        *states,
        [torch.zeros(())],
        [param.float()] if masters else [],
        [scales] * sum(kept) if state == "int8" else [],
        [1] if stochastic else [],
        lr=1e-3,
        squares=torch.empty(2, dtype=torch.float64, device="meta"),
        max_norm=1.0,
        **options,
    )


def _squares() -> None:
    squares_(
        torch.empty(1, dtype=torch.float64, device="meta"), 0, [torch.empty(4096, device="meta")]
    )


def _norm_forward(norm: str, dtype: torch.dtype, features: int) -> None:
    x = torch.empty(_ROWS, features, dtype=dtype, device="meta")
    getattr(norms, f"{norm}_forward")(x, x, x[0], x[0], 1, 1e-6)


def _norm_backward(norm: str, dtype: torch.dtype, features: int) -> None:
    x = torch.empty(_ROWS, features, dtype=dtype, device="meta")
    numbers = 1 if norm == "rms_norm" else 2
    kept = torch.empty(numbers * _ROWS, dtype=torch.float32, device="meta")
    getattr(norms, f"{norm}_backward")(x, x, x, x[0], kept, 1, True, True, True)


def _norm_softmax(dtype: torch.dtype, features: int, has_mask: bool, backward: bool) -> None:
    """``has_mask``: an additive one."""
    x = torch.empty(_ROWS, features, dtype=dtype, device="meta")
    call = x, x if has_mask else None, None, 1.0, 1e-6, 1
    if backward:
        norm_softmax.backward(x, *call, True, False)
    else:
        norm_softmax.forward(*call)


def _cross_entropy(dtype: torch.dtype) -> None:
    logits = torch.empty(_ROWS, 50304, dtype=dtype, device="meta")
    target = torch.empty(_ROWS, dtype=torch.int64, device="meta")
    scale = torch.empty((), device="meta")
    norm_softmax_cross_entropy.rows(
        logits, target, None, None, 1.0, 1e-6, 0.0, -100, scale, True, False
    )
