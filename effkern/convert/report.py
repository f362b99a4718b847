"""What a conversion did, what it left, and how it was checked."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Check",
    "ConversionReport",
    "Edit",
    "Folded",
    "Left",
    "NotConvertible",
    "Recentred",
    "Swapped",
]


class NotConvertible(RuntimeError):
    """A model that cannot be converted, or cannot be proved equal once converted.

    Attributes:
        module: path of the module where the proof fails; empty for the model itself.
        reason: why.
    """

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(module, reason)
        self.module, self.reason = module, reason

    def __str__(self) -> str:
        return f"{self.module or 'the model'}: {self.reason}"


@dataclass(frozen=True)
class Edit:
    """A parameter whose mean along ``dim``, over ``features`` entries, was subtracted; for CRMSNorm
    the last of them is zero now.
    """  # fmt: skip

    parameter: str
    dim: int
    features: int
    scaled_by: str | None = None  # a LayerScale that was multiplied in first, and is now one


@dataclass(frozen=True)
class Folded:
    """A parameter that took in a norm's affine."""

    parameter: str
    dim: int | None  # of a matrix, the dimension whose last entries were subtracted; None: a bias
    norm: str


@dataclass(frozen=True)
class Recentred:
    """A value whose mean is subtracted at run time: an input or an output of a module."""

    module: str
    value: str
    dim: int
    norms: int  # layer norms that this serves


@dataclass(frozen=True)
class Swapped:
    """A layer norm that is now an RMSNorm or a CRMSNorm."""

    module: str
    features: int
    eps: float
    how: str


@dataclass(frozen=True)
class Left:
    """A layer norm that stayed one."""

    module: str
    reason: str


@dataclass(frozen=True)
class Check:
    """A comparison of the model's outputs before and after, both computed in ``dtype``."""

    inputs: str
    dtype: str
    difference: float  # the largest, relative to the largest entry of the output or to one
    tolerance: float


@dataclass
class ConversionReport:
    """What `effkern.convert` did to a model; ``str`` of it is the text, `to_json` the data."""

    kind: str
    features: list[int] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    recentred: list[Recentred] = field(default_factory=list)
    swapped: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON."""
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        name = {"rmsnorm": "RMSNorm", "crmsnorm": "CRMSNorm"}[self.kind]
        folded = f"{len(self.folded)} with affines folded in; " if self.folded else ""
        lines = [
            f"{len(self.swapped)} layer norms became {name}, {len(self.left)} stayed; "
            f"{len(self.edits)} parameters centred; {folded}"
            f"recentred at run time in {len(self.recentred)} "
            + ("place" if len(self.recentred) == 1 else "places")
        ]
        lines += [f"  swapped    {s.module or 'the model'} ({s.how})" for s in self.swapped]
        lines += [
            f"  centred    {e.parameter}, dimension {e.dim}"
            + (f", after {e.scaled_by} was multiplied in" if e.scaled_by else "")
            for e in self.edits
        ]
        lines += [
            f"  folded     {f.norm} into {f.parameter}"
            + ("" if f.dim is None else f", dimension {f.dim}")
            for f in self.folded
        ]
        lines += [
            f"  recentred  {r.value} of {r.module or 'the model'}, for {r.norms} norms"
            for r in self.recentred
        ]
        lines += [f"  left       {left.module or 'the model'}: {left.reason}" for left in self.left]
        lines += [f"  equal      {', '.join(self.outputs)}"] if self.outputs else []
        lines += [
            f"  checked    {c.inputs}, {c.dtype}: difference {c.difference:.1e}, "
            f"at most {c.tolerance:.0e}"
            for c in self.checks
        ]
        lines += [f"  not proved {text}" for text in self.not_covered]
        return "\n".join(lines)
