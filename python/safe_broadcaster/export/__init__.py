"""Numbers of the event bus, connections, queues, aggregators and sources for Prometheus and OpenTelemetry.

Each lives in a module of its own, which needs the extra of its name: `safe_broadcaster.export.prometheus`,
`safe_broadcaster.export.opentelemetry`. The numbers are read when they are asked for, so they cost nothing in between.
The hub's own are on its port, under ``/metrics``.
"""
