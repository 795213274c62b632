"""What was observed since the last look, in constant memory, and what is made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safe_broadcaster.aggregator.interval import TimeScale

__all__ = ["ACTIVITY", "Outcome", "Series", "Window", "summarise"]

ACTIVITY = "lambda_max"
"""Name under which activity is observed."""


class Series:
    """Values of one name: how many, their sum, least, most and last."""

    __slots__ = ("count", "last", "least", "most", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.least = math.inf
        self.most = -math.inf
        self.last = math.nan

    def add(self, value: float) -> None:
        """Take a value in."""
        self.count += 1
        self.total += value
        self.last = value
        self.least = min(self.least, value)
        self.most = max(self.most, value)

    def merge(self, later: Series) -> None:
        """Take in what came later."""
        self.count += later.count
        self.total += later.total
        self.least = min(self.least, later.least)
        self.most = max(self.most, later.most)
        self.last = later.last

    @property
    def mean(self) -> float:
        """Of all values."""
        return self.total / self.count

    def to_dict(self) -> dict[str, float]:
        """Return ``count``, ``mean``, ``min``, ``max``, ``last``."""
        return {"count": self.count, "mean": self.mean, "min": self.least, "max": self.most, "last": self.last}


@dataclass(frozen=True)
class Window:
    """What was observed between two looks at a scale."""

    scale: TimeScale
    seconds: float
    """How long it was."""
    series: Mapping[str, Series]
    """By name; only names of which something was observed."""


class Outcome(NamedTuple):
    """What an aggregation found."""

    activity: float
    """How much is going on: decides when the next look is."""
    novelty: float
    """How new it is, 0 to 1: above ``novelty_threshold`` it is emitted."""
    content: Mapping[str, Any]
    """What is emitted then."""


def summarise(window: Window, before: Window | None) -> Outcome:
    """Sum a window up, which is what an `Aggregator` does unless it is given something else.

    Activity is the largest ``lambda_max`` that was observed, 0 if none was. Novelty is the largest relative change of a
    name's mean since it was last observed, |new - old| / max(|new|, |old|), at most 1; and 1 for a name that is new.
    """
    activity = window.series[ACTIVITY].most if ACTIVITY in window.series else 0.0
    old: Mapping[str, Series] = before.series if before is not None else {}
    novelty = max((_change(old.get(name), series) for name, series in window.series.items()), default=0.0)
    return Outcome(activity, novelty, {"series": {name: series.to_dict() for name, series in window.series.items()}})


def _change(old: Series | None, new: Series) -> float:
    if old is None:
        return 1.0
    scale = max(abs(old.mean), abs(new.mean))
    return min(abs(new.mean - old.mean) / scale, 1.0) if scale else 0.0
