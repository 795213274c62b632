"""What parts of this package tell of themselves, in a form that any monitoring takes; see `safe_broadcaster.export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Metric", "MetricSource"]


class Metric(NamedTuple):
    """One number now."""

    name: str
    """Snake case, without the prefix ``safe_broadcaster_`` and without ``_total``."""
    kind: Literal["counter", "gauge"]
    """A counter only grows."""
    help: str
    """What it counts, for people."""
    value: float
    labels: Mapping[str, str] = {}
    """Which of several numbers of this name it is."""


class MetricSource(Protocol):
    """Whatever has numbers: `EventBus`, `ConnectionManager`, `EmitterQueue`, `Aggregator`, `BackgroundTasks`."""

    def metrics(self) -> Iterable[Metric]:
        """Give the numbers as they are now; called by each scrape, on any thread."""
        ...
