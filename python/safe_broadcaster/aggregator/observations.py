"""What a program observes, gathered for each scale until that is looked at; in constant memory, from any thread."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from typing import TYPE_CHECKING, SupportsFloat

from safe_broadcaster.aggregator.window import Series
from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safe_broadcaster.aggregator.interval import TimeScale

__all__ = ["Observations"]

logger = logging.getLogger(__name__)

MOST_NAMES = 1000
"""Names that may be observed: memory is bounded, and nobody reads more."""


class Observations:
    """See the module. A value is taken in once, whatever the number of scales; looking merges what came since."""

    def __init__(self, scales: Iterable[TimeScale]) -> None:
        self.refused = 0
        """Values of names beyond the bound, and those that are NaN or infinite."""
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self._latest: dict[str, Series] = {}
        self._gathered: dict[TimeScale, dict[str, Series]] = {scale: {} for scale in scales}

    def observe(self, name: str, value: float) -> None:
        """Take a value in."""
        if type(value) is not float:
            value = _as_float(name, value)
        if not math.isfinite(value):  # one of them would spoil all sums, and JSON cannot carry it
            self._refuse(f"{value} of {name!r} is not observed: give a finite number")
            return
        with self._lock:
            series = self._latest.get(name)
            if series is not None:
                series.add(value)
                return
            if name in self._names or len(self._names) < MOST_NAMES:
                self._names.add(name)
                series = self._latest[name] = Series()
                series.add(value)
                return
        self._refuse(f"{name!r} is not observed: there are {MOST_NAMES} names already; fewer will do")

    def take(self, scale: TimeScale) -> dict[str, Series]:
        """Return what was observed since this scale was last looked at."""
        with self._lock:
            latest, self._latest = self._latest, {}
            for gathered in self._gathered.values():
                _merge(gathered, latest)
            taken, self._gathered[scale] = self._gathered[scale], {}
            return taken

    def give_back(self, scale: TimeScale, taken: dict[str, Series]) -> None:
        """Keep what could not be made use of for the next look."""
        with self._lock:
            _merge(taken, self._gathered[scale])
            self._gathered[scale] = taken

    def _refuse(self, why: str) -> None:
        with self._lock:
            self.refused += 1
            first = self.refused == 1
        if first:
            logger.error("%s", why)


def _merge(older: dict[str, Series], newer: dict[str, Series]) -> None:
    for name, series in newer.items():
        older.setdefault(name, Series()).merge(series)


def _as_float(name: str, value: object) -> float:
    if isinstance(value, (int, SupportsFloat)):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    raise ConfigError(f"value={value!r} of {name!r} is not allowed: give a number")
