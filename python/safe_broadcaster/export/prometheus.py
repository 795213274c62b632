"""For Prometheus; needs ``pip install 'safe-broadcaster[prometheus]'``.

::

    from safe_broadcaster.export.prometheus import register

    register(aggregator, event_bus)  # on /metrics of prometheus_client.start_http_server(9000)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.registry import CollectorRegistry

    from safe_broadcaster.metrics import MetricSource

__all__ = ["Collector", "register"]


class Collector:
    """Gives the numbers of its sources to a registry, summed up where several sources have the same."""

    def __init__(self, *sources: MetricSource) -> None:
        for source in sources:
            if not hasattr(source, "metrics"):
                raise ConfigError(f"source={source!r} is not allowed: give an EventBus, Aggregator, or the like")
        self._sources = sources

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Read the numbers; called by the registry."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        values: dict[str, dict[tuple[str, ...], float]] = {}
        for source in self._sources:
            for metric in source.metrics():
                name = f"safe_broadcaster_{metric.name}"
                if name not in families:
                    family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                    families[name] = family(name, metric.help, labels=list(metric.labels))
                labels = tuple(metric.labels.values())
                known = values.setdefault(name, {})
                known[labels] = known.get(labels, 0.0) + metric.value
        for name, family in families.items():
            for labels, value in values[name].items():
                family.add_metric(labels, value)
            yield family


def register(*sources: MetricSource, registry: CollectorRegistry = REGISTRY) -> Callable[[], None]:
    """Have a registry give the numbers of these sources.

    Args:
        sources: `EventBus`, `ConnectionManager`, `EmitterQueue`, `Aggregator`, `BackgroundTasks`, or anything else with
            ``metrics()``.
        registry: By default the one that ``prometheus_client`` serves.

    Returns:
        A function that ends it.

    Raises:
        ConfigError: A source has no ``metrics()``.
        ValueError: The registry has the same numbers already, of another call: give all sources at once.

    """
    collector = Collector(*sources)
    registry.register(collector)

    def unregister() -> None:
        registry.unregister(collector)

    return unregister
