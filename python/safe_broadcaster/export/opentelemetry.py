"""For OpenTelemetry; needs ``pip install 'safe-broadcaster[opentelemetry]'``, and an SDK to send anything.

::

    from safe_broadcaster.export.opentelemetry import register

    register(aggregator, event_bus)  # on the program's meter provider
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from opentelemetry import metrics
from opentelemetry.metrics import Observation

from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from opentelemetry.metrics import CallbackOptions, Meter

    from safe_broadcaster.metrics import Metric, MetricSource

__all__ = ["register"]


def register(*sources: MetricSource, meter: Meter | None = None) -> None:
    """Have a meter give the numbers of these sources whenever they are collected.

    Args:
        sources: `EventBus`, `ConnectionManager`, `EmitterQueue`, `Aggregator`, `BackgroundTasks` that have their
            sources, or anything else with ``metrics()``.
        meter: By default one of the program's meter provider, called ``safe_broadcaster``.

    Raises:
        ConfigError: A source has no ``metrics()``, or no numbers yet, of which the meter has to know the names.

    """
    meter = meter or metrics.get_meter("safe_broadcaster")
    known: dict[str, Metric] = {}
    for source in sources:
        if not hasattr(source, "metrics"):
            raise ConfigError(f"source={source!r} is not allowed: give an EventBus, Aggregator, or the like")
        names = {metric.name: metric for metric in source.metrics()}
        if not names:
            raise ConfigError(f"source={source!r} is not allowed: it has no numbers yet; add its sources first")
        known |= names
    for name, metric in known.items():
        create = meter.create_observable_counter if metric.kind == "counter" else meter.create_observable_gauge
        create(f"safe_broadcaster.{name}", [functools.partial(_observe, sources, name)], description=metric.help)


def _observe(sources: Iterable[MetricSource], name: str, _: CallbackOptions) -> Iterator[Observation]:
    values: dict[tuple[tuple[str, str], ...], float] = {}
    for source in sources:
        for metric in source.metrics():
            if metric.name == name:
                labels = tuple(metric.labels.items())
                values[labels] = values.get(labels, 0.0) + metric.value
    for labels, value in values.items():
        yield Observation(value, dict(labels))
