"""Who effkern is compared with: the strongest that a user could pick, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkern.bench.machine import is_importable

#: Makes an optimizer over parameters and gives its step.
MakeStep = Callable[[list[nn.Parameter]], Callable[[], object]]

#: ``(x, parameters, residual or None) -> (y,)`` or, with a residual, ``(y, x + residual)``.
Norm = Callable[[Tensor, tuple[Tensor, ...], Tensor | None], tuple[Tensor, ...]]

#: What every contestant's optimizer is set to.
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

#: Of every contestant's norm.
EPS = 1e-6


@dataclass
class Peers:
    """Peers by name, and for each that is not there, why."""

    found: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Any], *, needs: str | None = None) -> None:
        """Add what ``make`` gives; what is missing or fails is left out, with the reason."""
        if needs is not None and not is_importable(needs):
            self.left_out[name] = f"the package {needs} is not installed"
            return
        try:
            self.found[name] = make()
        except Exception as error:  # somebody else's package may fail in any way
            self.leave_out(name, error)

    def leave_out(self, name: str, error: Exception) -> None:
        """Drop a peer that turned out not to work here."""
        self.found.pop(name, None)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.left_out[name] = f"{type(error).__name__}: {first_line}"


def adamw_peers(device: torch.device, *, compiled: bool) -> Peers:
    """AdamW of others, each a `MakeStep`."""
    peers = Peers()
    peers.found["torch fused"] = lambda p: torch.optim.AdamW(p, fused=True, **ADAMW).step
    peers.found["torch foreach"] = lambda p: torch.optim.AdamW(p, foreach=True, **ADAMW).step
    if compiled:
        peers.found["torch.compile"] = _compiled_adamw
    else:
        peers.left_out["torch.compile"] = "not asked for: --compile"
    if device.type == "cuda":
        peers.add("Apex FusedAdam", _apex_adamw, needs="apex")
        peers.add(
            "DeepSpeed FusedAdam",
            lambda: _deepspeed_adamw("FusedAdam", "adam_w_mode"),
            needs="deepspeed",
        )
    else:
        peers.add(
            "DeepSpeed CPUAdam",
            lambda: _deepspeed_adamw("DeepSpeedCPUAdam", "adamw_mode"),
            needs="deepspeed",
        )
    return peers


def torch_peers(name: str, options: dict[str, Any]) -> Peers:
    """The fastest form of ``torch.optim.NAME`` as a `MakeStep`: fused where it has one."""
    optimizer = getattr(torch.optim, name, None)
    if optimizer is None:
        return Peers(left_out={"torch": f"torch.optim has no {name}"})
    form = "fused" if "fused" in signature(optimizer).parameters else "foreach"
    return Peers(found={f"torch {form}": lambda p: optimizer(p, **{form: True}, **options).step})


def clipped_adamw(max_norm: float) -> MakeStep:
    """Torch's clipping, which rewrites the gradients, and then its fused AdamW."""

    def make_step(parameters: list[nn.Parameter]) -> Callable[[], object]:
        step = torch.optim.AdamW(parameters, fused=True, **ADAMW).step

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            step()

        return clip_and_step

    return make_step


def _compiled_adamw(parameters: list[nn.Parameter]) -> Callable[[], object]:
    return torch.compile(torch.optim.AdamW(parameters, foreach=True, **ADAMW).step)


def _apex_adamw() -> MakeStep:
    optimizers = import_module("apex.optimizers")
    return lambda p: optimizers.FusedAdam(p, adam_w_mode=True, **ADAMW).step


def _deepspeed_adamw(class_name: str, mode_argument: str) -> MakeStep:
    optimizer = getattr(import_module("deepspeed.ops.adam"), class_name)
    return lambda p: optimizer(p, **{mode_argument: True}, **ADAMW).step


def norm_peers(name: str, device: torch.device, *, compiled: bool) -> Peers:
    """Norms of others, each a `Norm`.

    Args:
        name: "rms_norm" or "crms_norm", which take a weight, or "layer_norm", with weight and bias.
            Beside the first two stands layer_norm too: torch's fastest, though another formula.
        device: where they run.
        compiled: whether torch.compile of the eager formula takes part.
    """
    peers = Peers()
    eager = added_first(EAGER_NORMS[name])
    peers.found[f"torch {name}" if name in TORCH_NORMS else f"eager {name}"] = eager
    if compiled:
        peers.found["torch.compile"] = torch.compile(eager, dynamic=False, fullgraph=True)
    else:
        peers.left_out["torch.compile"] = "not asked for: --no-compile"
    peers.found.setdefault("torch layer_norm", added_first(_layer_norm))
    if device.type == "cuda":
        for package, (module, makers) in _GPU_NORMS.items():
            if name in makers:
                peers.add(package, makers[name], needs=module)
    return peers


def added_first(norm: Callable[..., Tensor]) -> Norm:
    """A norm of one input and its parameters, after an addition where there is a residual."""

    def run(
        x: Tensor, parameters: tuple[Tensor, ...], residual: Tensor | None
    ) -> tuple[Tensor, ...]:
        if residual is None:
            return (norm(x, *parameters),)
        total = x + residual
        return norm(total, *parameters), total

    return run


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _crms_norm(x: Tensor, weight: Tensor) -> Tensor:
    squares = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()
    return x * torch.rsqrt(squares / (x.shape[-1] + 1) + EPS) * weight


#: What a user of stock PyTorch writes.
EAGER_NORMS: dict[str, Callable[..., Tensor]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "crms_norm": _crms_norm,
}

#: Those that PyTorch has itself.
TORCH_NORMS = ("rms_norm", "layer_norm")


def _liger_rms_norm() -> Norm:
    liger = import_module("liger_kernel.transformers.functional")

    def norm(
        x: Tensor, parameters: tuple[Tensor, ...], residual: Tensor | None
    ) -> tuple[Tensor, ...]:
        # in_place would overwrite the gradients, which rotate among the contestants.
        if residual is None:
            return (liger.liger_rms_norm(x, *parameters, EPS, in_place=False),)
        return liger.liger_fused_add_rms_norm(x, residual, *parameters, EPS, in_place=False)

    return norm


def _liger_layer_norm() -> Norm:
    liger = import_module("liger_kernel.transformers.functional")
    return added_first(lambda x, weight, bias: liger.liger_layer_norm(x, weight, bias, EPS))


def _quack_rms_norm() -> Norm:
    rmsnorm = import_module("quack").rmsnorm

    def norm(
        x: Tensor, parameters: tuple[Tensor, ...], residual: Tensor | None
    ) -> tuple[Tensor, ...]:
        if residual is None:
            return (rmsnorm(x, *parameters, eps=EPS),)
        return rmsnorm(x, *parameters, residual=residual, eps=EPS, prenorm=True)

    return norm


def _apex_rms_norm() -> Norm:
    apex = import_module("apex.normalization.fused_layer_norm")
    return added_first(lambda x, weight: apex.fused_rms_norm_affine(x, weight, weight.shape, EPS))


def _apex_layer_norm() -> Norm:
    apex = import_module("apex.normalization.fused_layer_norm")
    return added_first(
        lambda x, weight, bias: apex.fused_layer_norm_affine(x, weight, bias, weight.shape, EPS)
    )


#: By package: the module that it is imported by, and how each norm that it has is made.
_GPU_NORMS: dict[str, tuple[str, dict[str, Callable[[], Norm]]]] = {
    "Liger": ("liger_kernel", {"rms_norm": _liger_rms_norm, "layer_norm": _liger_layer_norm}),
    "Quack": ("quack", {"rms_norm": _quack_rms_norm}),
    "Apex": ("apex", {"rms_norm": _apex_rms_norm, "layer_norm": _apex_layer_norm}),
}
