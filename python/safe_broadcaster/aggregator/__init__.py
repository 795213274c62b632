"""Looking at what a program observes, at paces that follow its activity, and emitting what is new."""

from __future__ import annotations

from safe_broadcaster.aggregator.aggregator import Aggregator
from safe_broadcaster.aggregator.emitter_queue import EmitterQueue
from safe_broadcaster.aggregator.interval import PACES, AdaptiveInterval, Pace, TimeScale
from safe_broadcaster.aggregator.window import Outcome, Series, Window, summarise

__all__ = [
    "PACES",
    "AdaptiveInterval",
    "Aggregator",
    "EmitterQueue",
    "Outcome",
    "Pace",
    "Series",
    "TimeScale",
    "Window",
    "summarise",
]
