"""What an exchange of modules did: the records that `swap_norms` and `swap_softmax` give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from torch import nn

#: What a module was and is: its class, or the name of what it calls.
Kind = TypeVar("Kind", type[nn.Module], str)


@dataclass(frozen=True)
class Swapped(Generic[Kind]):
    """A module that was exchanged, or what it calls.

    Attributes:
        path: its name in the model; empty for the model itself.
        module: the module, the same object as before.
        was: what it was before.
        now: what it is since.
    """

    path: str
    module: nn.Module
    was: Kind
    now: Kind


@dataclass(frozen=True)
class Left:
    """A module that stayed as it was.

    Attributes:
        path: its name in the model; empty for the model itself.
        kind: its class.
        reason: why.
    """

    path: str
    kind: type[nn.Module]
    reason: str


@dataclass
class Report(Generic[Kind]):
    """What an exchange did.

    Attributes:
        swapped: what was exchanged, in the order of ``model.named_modules()``.
        left: what was not, and why.
    """

    #: What is exchanged.
    noun: ClassVar[str]

    swapped: list[Swapped[Kind]] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} {self.noun} swapped, {len(self.left)} left"]
        lines += [
            f"  swapped {m.path or '(the model)'}: {_name(m.was)} -> {_name(m.now)}"
            for m in self.swapped
        ]
        lines += [
            f"  left    {m.path or '(the model)'}: {m.kind.__name__}: {m.reason}" for m in self.left
        ]
        return "\n".join(lines)


def _name(kind: type[nn.Module] | str) -> str:
    return kind if isinstance(kind, str) else kind.__name__
