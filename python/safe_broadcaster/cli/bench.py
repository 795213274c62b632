"""``safe-broadcaster bench``: what this machine does, from one process through a hub of its own."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click
import orjson

from safe_broadcaster.cli.common import POSITIVE, CommandError, echo_json, json_option
from safe_broadcaster.emitter import SafeBroadcaster

if TYPE_CHECKING:
    from safe_broadcaster.config import Durability

__all__ = ["bench"]

_LATENCIES = 500
"""Events that are sent one by one to see how long one takes."""


@click.command()
@click.option("--events", type=click.IntRange(min=1), default=100_000, show_default=True, help="How many.")
@click.option("--bytes", "size", type=click.IntRange(min=1), default=400, show_default=True, help="Of each, as JSON.")
@click.option("--durability", type=click.Choice(["memory", "process", "power"]), default="process", show_default=True)
@click.option("--timeout", type=POSITIVE, default=60.0, show_default=True, help="Seconds to wait for delivery.")
@json_option()
def bench(*, events: int, size: int, durability: Durability, timeout: float, as_json: bool) -> None:
    """Measure this machine: what a call costs, and how fast events go through a hub.

    A first impression, no more: emitter and hub share one process. Nothing is left behind.
    """
    figures = asyncio.run(_measured(events, _event(size), durability, timeout))
    if as_json:
        echo_json(figures)
        return
    click.echo(f"{figures['events']} events of {figures['bytes']} bytes, durability {figures['durability']}")
    click.echo(f"orjson.dumps of one     {figures['dumps_us']:8.2f} µs")
    click.echo(f"await safe_emit of one  {figures['call_us']:8.2f} µs")
    click.echo(f"confirmed by the hub    {figures['confirmed_per_s']:8.0f} events/s")
    middle, most = figures["latency_p50_ms"], figures["latency_p99_ms"]
    click.echo(f"confirmed, one by one   {middle:8.2f} ms in the middle, {most:.2f} ms for 99 %")


def _event(size: int) -> dict[str, Any]:
    event = {"type": "bench.event", "topic": "bench/event", "content": {"n": 1_000_000, "fill": ""}}
    event["content"]["fill"] = "x" * max(0, size - len(orjson.dumps(event)))  # type: ignore[index]
    return event


async def _measured(events: int, event: dict[str, Any], durability: Durability, timeout: float) -> dict[str, Any]:
    from safe_broadcaster.hub import EventBroadcaster  # noqa: PLC0415 - only here

    began = perf_counter()
    for _ in range(events):
        orjson.dumps(event)
    dumps = perf_counter() - began
    with tempfile.TemporaryDirectory(prefix="safe-broadcaster-bench-") as folder:
        path = Path(folder) / "spill.db"
        async with (
            EventBroadcaster(port=0) as hub,
            SafeBroadcaster(hub.url, path, durability=durability) as broadcaster,
        ):
            began = perf_counter()
            for _ in range(events):
                await broadcaster.safe_emit(event)
            called = perf_counter() - began
            if not await broadcaster.drain(timeout):
                raise CommandError(f"not confirmed within {timeout:g} s: take fewer --events")
            confirmed = perf_counter() - began
            latencies: list[float] = []
            for _ in range(_LATENCIES):
                began = perf_counter()
                await broadcaster.safe_emit(event, durability="delivered")
                latencies.append((perf_counter() - began) * 1e3)
    latencies.sort()
    return {
        "events": events,
        "bytes": len(orjson.dumps(event)),
        "durability": durability,
        "dumps_us": dumps / events * 1e6,
        "call_us": called / events * 1e6,
        "confirmed_per_s": events / confirmed,
        "latency_p50_ms": latencies[len(latencies) // 2],
        "latency_p99_ms": latencies[len(latencies) * 99 // 100],
    }
