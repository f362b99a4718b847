"""Medians, quartiles, and ratios taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median with the lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; quartiles interpolate between the values' own range."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def scaled(self, factor: float) -> Spread:
        """All three, times a positive ``factor``."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of each round's ratio: a slow spell of the machine hits both sides of a round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])
