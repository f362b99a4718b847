"""``effkern bench optimizers``: one step of each rule over many tensors, beside torch's."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import effkern
from effkern.bench import machine
from effkern.bench.adam import STREAMS, Work, measure
from effkern.bench.limits import Streams, moved_bytes
from effkern.bench.memory import release_free_memory
from effkern.bench.peers import ADAMW, MakeStep, Peers, clipped_adamw, torch_peers
from effkern.bench.progress import Report, silent
from effkern.bench.results import OURS, Case, Result

#: Far below the norm of the random gradients (GPT-2 small's is about 220), so every step scales.
MAX_NORM = 1.0

#: A step with one state: parameter, gradient and state are read, parameter and state written.
ONE_STATE = Streams(reads=3, writes=2, in_place=True)

#: LAMB's states move on, and leave the norms; then the parameter moves by states and norms.
LAMB_PASSES = (Streams(reads=4, writes=2, in_place=True), Streams(reads=3, writes=1, in_place=True))

#: The norm of the gradients, then AdamW's step.
CLIPPED_PASSES = (Streams(reads=1, writes=0), STREAMS)

PLAIN = f"{OURS}, plain AdamW"
TORCH_CLIPPED = "torch clip_grad_norm_, fused"


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: of torch's class, where there is one; effkern's is the same with "Fused" before it.
        passes: of its step over memory.
        options: what every contestant's optimizer is set to.
        detail: what the options add to the name.
    """

    name: str
    passes: Sequence[Streams]
    options: Mapping[str, Any] = field(default_factory=dict)
    detail: str = ""


RULES: dict[str, Rule] = {
    "adamw": Rule("AdamW", (STREAMS,), ADAMW),
    "sgd": Rule("SGD", (ONE_STATE,), {"lr": 1e-3, "momentum": 0.9}, " with momentum"),
    "adagrad": Rule("Adagrad", (ONE_STATE,)),
    "rmsprop": Rule("RMSprop", (ONE_STATE,)),
    "adadelta": Rule("Adadelta", (STREAMS,)),
    "lion": Rule("Lion", (ONE_STATE,)),
    "lamb": Rule("LAMB", LAMB_PASSES),
}

#: The cases that are not plain rules.
VARIANTS = ("int8", "clip")

#: What can be asked for.
CASES = (*RULES, *VARIANTS)

#: What a reader of a case's figures must know.
NOTES = {
    "int8": "8-bit states: without the scales, 1/16 byte an element more; the limit's streams are "
    "as many as the step's, all of float32; steps with other states have no bandwidth here",
    "clip": f"clipping: {TORCH_CLIPPED}: it rewrites its gradients, which are restored before each "
    "step, untimed",
}


@dataclass(frozen=True)
class OptimizersSettings:
    """What to measure.

    Attributes:
        device: where the tensors are.
        cases: names from `CASES`.
        tensors: names from `effkern.bench.adam.TENSOR_SETS`.
        dtype: of parameters, gradients and, but for ``int8``, states, by torch's name.
        rounds: timed rounds for each case and set.
        seed: of the parameters and gradients.
    """

    device: str = "cpu"
    cases: Sequence[str] = CASES
    tensors: Sequence[str] = ("gpt2",)
    dtype: str = "float32"
    rounds: int = 20
    seed: int = 0


def run(settings: OptimizersSettings, report: Report = silent) -> Result:
    """Measure every case on every set of tensors, one after the other: memory holds one of them."""
    dtype = getattr(torch, settings.dtype)
    cases: list[Case] = []
    left_out: dict[str, str] = {}
    notes = []
    for name in settings.cases:
        if name == "int8" and dtype == torch.float64:
            left_out[name] = "float64 parameters have no 8-bit states"
            continue
        work = work_of(name, dtype)
        for tensors in settings.tensors:
            cases.append(measure(work, tensors, settings, report))
            gc.collect()  # optimizers may hold themselves in cycles
            release_free_memory(torch.device(settings.device))
        left_out |= {f"{work.title}: {peer}": why for peer, why in work.peers.left_out.items()}
        notes += [NOTES[name]] if name in NOTES else []
    return Result(
        "optimizers", dataclasses.asdict(settings), machine.describe(), cases, left_out, notes
    )


def work_of(case: str, dtype: torch.dtype) -> Work:
    """The contestants, passes and bytes of a case from `CASES`, for parameters of ``dtype``."""
    if case == "int8":
        return _int8_work(dtype)
    if case == "clip":
        return _clip_work(dtype)
    rule = RULES[case]
    options = dict(rule.options)
    return Work(
        rule.name + rule.detail,
        _effkern_step(f"Fused{rule.name}", options),
        torch_peers(rule.name, options),
        rule.passes,
        moved_bytes(rule.passes, dtype.itemsize),
    )


def _int8_work(dtype: torch.dtype) -> Work:
    """8-bit states beside states in the parameters' dtype."""
    plain = {PLAIN: _effkern_step("FusedAdamW", ADAMW)}
    peers = Peers(found={**plain, **torch_peers("AdamW", ADAMW).found})
    parameter_and_gradient, states = Streams(reads=2, writes=1), Streams(reads=2, writes=2)
    moved = moved_bytes([parameter_and_gradient], dtype.itemsize)
    return Work(
        "AdamW with 8-bit states",
        _effkern_step("FusedAdamW", {**ADAMW, "state_dtype": "int8"}),
        peers,
        (STREAMS,),
        moved + moved_bytes([states], torch.int8.itemsize),
        other_work=frozenset(peers.found),
    )


def _clip_work(dtype: torch.dtype) -> Work:
    """Clipping within the step, beside no clipping and beside clipping before it."""
    peers = Peers(found={PLAIN: _effkern_step("FusedAdamW", ADAMW)})
    peers.found[TORCH_CLIPPED] = clipped_adamw(MAX_NORM)
    return Work(
        "AdamW with clipped gradients",
        _effkern_step("FusedAdamW", {**ADAMW, "max_grad_norm": MAX_NORM}),
        peers,
        CLIPPED_PASSES,
        moved_bytes(CLIPPED_PASSES, dtype.itemsize),
        rewriting=frozenset({TORCH_CLIPPED}),
        other_work=frozenset({PLAIN}),
    )


def _effkern_step(class_name: str, options: Mapping[str, Any]) -> MakeStep:
    optimizer = getattr(effkern, class_name)

    def make_step(parameters: list[nn.Parameter]) -> Callable[[], object]:
        return optimizer(parameters, **options).step

    return make_step
