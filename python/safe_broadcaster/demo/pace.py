"""When the next event is due, without a sleep for each."""

from __future__ import annotations

import asyncio
from time import monotonic

__all__ = ["Pace"]

SLICE = 0.01
"""Seconds: shorter sleeps than this cost more wake-ups than they smooth."""

CATCH_UP = 0.25
"""Seconds: what a late engine may make up for, so that a pause does not end in a burst."""


class Pace:
    """Lets ``rate`` events a second through, in slices of about ten milliseconds."""

    def __init__(self, rate: float) -> None:
        self._gap = 1.0 / rate
        self._due = self._rested = monotonic()

    async def turn(self) -> None:
        """Waits until the next event is due; lets others run at least once in each slice."""
        now = monotonic()
        self._due = max(self._due + self._gap, now - CATCH_UP)
        if max(self._due - now, now - self._rested) > SLICE:
            await asyncio.sleep(max(0.0, self._due - now))
            self._rested = monotonic()
