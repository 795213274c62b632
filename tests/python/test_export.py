"""Prometheus and OpenTelemetry read the numbers that the parts tell."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from safe_broadcaster import (
    Aggregator,
    BackgroundTasks,
    ConfigError,
    ConnectionManager,
    EmitterQueue,
    EventBus,
    TimeScale,
)
from safe_broadcaster.export import opentelemetry, prometheus


async def used_parts() -> tuple:
    """One of each, with something to tell."""

    async def emit(event: object) -> None:
        if event == "bad":
            raise ValueError("no")

    bus = EventBus()
    bus.subscribe(int, emit)
    await bus.publish(7)
    await bus.drain()
    aggregator = Aggregator({"redis": emit})
    aggregator.observe("a")
    await aggregator.look(TimeScale.MICRO)
    queue = EmitterQueue({"mail": emit})
    queue.put_nowait("bad")
    await queue.drain()
    await aggregator.queue.drain()
    manager = ConnectionManager()
    await manager.broadcast({"type": "a"})
    return bus, aggregator, queue, manager


WANTED = {
    ("bus_calls_total", ("outcome", "handled")): 1,
    ("bus_published_total",): 1,
    ("aggregator_novelties_total",): 1,
    ("aggregator_interval_seconds", ("scale", "macro")): 300,
    ("emitter_events_total", ("emitter", "redis"), ("outcome", "emitted")): 1,
    ("emitter_events_total", ("emitter", "mail"), ("outcome", "failed")): 1,
    ("emitter_breaker_open", ("emitter", "mail")): 0,
    ("connection_broadcasts_total",): 1,
    ("connections",): 0,
}


async def test_prometheus_scrapes_them() -> None:
    registry = CollectorRegistry()
    parts = await used_parts()
    unregister = prometheus.register(*parts, registry=registry)
    text = generate_latest(registry).decode()
    found = {
        (sample.name.removeprefix("safe_broadcaster_"), *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert {key: found.get(key) for key in WANTED} == WANTED
    assert "# HELP safe_broadcaster_bus_calls_total Calls of handlers by outcome." in text
    unregister()
    assert generate_latest(registry) == b""


async def test_a_metric_is_summed_over_its_sources_and_read_anew_by_each_scrape() -> None:
    registry, first, second = CollectorRegistry(), EventBus(), EventBus()
    prometheus.register(first, second, registry=registry)
    for bus in (first, second, second):
        await bus.publish("a")
    name = "safe_broadcaster_bus_published_total"
    assert registry.get_sample_value(name) == 3
    await first.publish("a")
    assert registry.get_sample_value(name) == 4


async def test_opentelemetry_collects_them() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    parts = await used_parts()
    opentelemetry.register(*parts, meter=provider.get_meter("test"))
    await parts[0].publish(8)
    found = {}
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    labels = sorted(point.attributes.items())
                    key = (metric.name.removeprefix("safe_broadcaster."), *labels)
                    found[key] = point.value
    wanted = {(name.removesuffix("_total"), *labels): value for (name, *labels), value in WANTED.items()}
    wanted["bus_published",] = 2
    assert {key: found.get(key) for key in wanted} == wanted
    provider.shutdown()


def test_opentelemetry_has_to_know_the_names_of_what_it_is_given() -> None:
    with pytest.raises(ConfigError, match="it has no numbers yet"):
        opentelemetry.register(BackgroundTasks(ConnectionManager()))


@pytest.mark.parametrize("register", [prometheus.register, opentelemetry.register])
def test_what_has_no_numbers_is_refused(register) -> None:
    with pytest.raises(ConfigError, match="source=7 is not allowed"):
        register(7)
