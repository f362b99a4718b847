"""A step's tensors with states in other dtypes, masters and keys of stochastic rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.backends.reference.quantize import dequantized, quantized
from tests.support.rules import Rule, random_tensors


class Stored:
    """One parameter's or many parameters' tensors, stored in any way.

    Args:
        rule: whose states they have.
        dtype: of parameters and gradients.
        state: a dtype, or "int8".
        options: for which states are kept.
    """

    def __init__(
        self,
        rule: Rule,
        sizes: list[Any],
        dtype: torch.dtype,
        device: str,
        state: Any,
        options: dict[str, Any],
        *,
        masters: bool = False,
        keys: bool = False,
        steps: tuple[float, ...] = (3.0,),
    ) -> None:
        self.rule, self.options, self.quantized = rule, options, state == "int8"
        plain = random_tensors(rule, sizes, torch.float32, device, steps=steps)
        self.params = [p.to(dtype) for p in plain.params]
        self.grads = [g.to(dtype) for g in plain.grads]
        self.steps = plain.steps
        self.kept = rule.kept(options)
        self.states: list[list[Tensor]] = []
        self.scales: list[Tensor] = []
        for one, keep, signed in zip(plain.states, self.kept, rule.ops.signed, strict=True):
            if not keep:
                self.states.append([])
            elif self.quantized:
                pairs = [quantized(t, signed) for t in one]
                self.states.append([codes for codes, _ in pairs])
                self.scales += [scales for _, scales in pairs]
            else:
                self.states.append([t.to(state) for t in one])
        # Masters hold more digits than their parameters.
        self.masters = [p.float() * 1.001 for p in self.params] if masters else []
        self.keys = [7919 * (i + 1) << 20 for i in range(len(sizes))] if keys else []

    def clone(self) -> Stored:
        other = object.__new__(Stored)
        other.__dict__.update(self.__dict__)
        for name in ("params", "grads", "steps", "scales", "masters"):
            setattr(other, name, [t.clone() for t in getattr(self, name)])
        other.states = [[t.clone() for t in one] for one in self.states]
        return other

    def step(self, kernel: Any, **more: Any) -> None:
        kernel(
            self.params,
            self.grads,
            *self.states,
            self.steps if self.rule.counts or self.keys else [],
            self.masters,
            self.scales,
            self.keys,
            **{**self.options, **more},
        )

    def values(self) -> list[list[Tensor]]:
        """The states as float32 values."""
        count, found, k = len(self.params), [], 0
        for one in self.states:
            if one and self.quantized:
                scales = self.scales[k * count : (k + 1) * count]
                found.append([dequantized(c, s) for c, s in zip(one, scales, strict=True)])
                k += 1
            else:
                found.append([t.float() for t in one])
        return found


def compare(rule: Rule, mine: Stored, right: Stored) -> None:
    """Equal to the reference, but for one code where a value lies between two."""
    for a, b in zip(mine.steps, right.steps, strict=True):
        assert a.item() == b.item()
    # LAMB's direction comes from the states as stored, where two roundings may differ.
    loose = rule.name == "lamb"
    for a, b in zip(mine.masters, right.masters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-2 if loose else 1e-6)
    for a, b in zip(mine.scales, right.scales, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8, equal_nan=True)
    for one, other in zip(mine.states, right.states, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            if mine.quantized:
                off = (a.int() - b.int()).abs()
                assert off.numel() == 0 or off.max() <= 1
                assert (off > 0).sum() <= 1 + off.numel() // 50
            else:
                eps = torch.finfo(a.dtype).eps
                torch.testing.assert_close(a, b, rtol=max(eps, 1e-5), atol=1e-6)
    for a, b in zip(mine.params, right.params, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(
            a.float(), b.float(), rtol=1e-2 if loose else eps, atol=1e-2 if loose else 1e-5
        )
