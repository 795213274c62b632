"""``safe-broadcaster bench``: what this machine does, from one process through a hub of its own."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import orjson

from safe_broadcaster.cli.common import CommandError, positive
from safe_broadcaster.emitter import SafeBroadcaster

if TYPE_CHECKING:
    import argparse

__all__ = ["TEXT", "add", "run"]

TEXT = "measure this machine: what a call costs, and how fast events go through a hub; a first impression, no more"

_LATENCIES = 500
"""Events that are sent one by one to see how long one takes."""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    parser.add_argument("--events", type=int, default=100_000, metavar="N", help="how many (default: 100000)")
    parser.add_argument("--bytes", type=int, default=400, metavar="N", help="size of each as JSON (default: 400)")
    parser.add_argument(
        "--durability", choices=["memory", "process", "power"], default="process", help="(default: process)"
    )
    parser.add_argument("--timeout", type=positive, default=60.0, help="seconds to wait for delivery (default: 60)")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Run it."""
    figures = asyncio.run(_measured(arguments))
    if arguments.json:
        print(json.dumps(figures))
        return 0
    print(f"{figures['events']} events of {figures['bytes']} bytes, durability {figures['durability']}")
    print(f"orjson.dumps of one     {figures['dumps_us']:8.2f} µs")
    print(f"await safe_emit of one  {figures['call_us']:8.2f} µs")
    print(f"confirmed by the hub    {figures['confirmed_per_s']:8.0f} events/s")
    middle, most = figures["latency_p50_ms"], figures["latency_p99_ms"]
    print(f"confirmed, one by one   {middle:8.2f} ms in the middle, {most:.2f} ms for 99 %")
    return 0


def _event(size: int) -> dict[str, Any]:
    event = {"type": "bench.event", "topic": "bench/event", "content": {"n": 1_000_000, "fill": ""}}
    event["content"]["fill"] = "x" * max(0, size - len(orjson.dumps(event)))  # type: ignore[index]
    return event


async def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    from safe_broadcaster.hub import EventBroadcaster  # noqa: PLC0415 - only here

    if arguments.events < 1:
        raise CommandError(f"--events {arguments.events} is not more than 0")
    event = _event(arguments.bytes)
    began = perf_counter()
    for _ in range(arguments.events):
        orjson.dumps(event)
    dumps = perf_counter() - began
    with tempfile.TemporaryDirectory(prefix="safe-broadcaster-bench-") as folder:
        path = Path(folder) / "spill.db"
        async with (
            EventBroadcaster(port=0) as hub,
            SafeBroadcaster(hub.url, path, durability=arguments.durability) as broadcaster,
        ):
            began = perf_counter()
            for _ in range(arguments.events):
                await broadcaster.safe_emit(event)
            called = perf_counter() - began
            if not await broadcaster.drain(arguments.timeout):
                raise CommandError(f"not confirmed within {arguments.timeout:g} s: take fewer --events")
            confirmed = perf_counter() - began
            latencies: list[float] = []
            for _ in range(_LATENCIES):
                began = perf_counter()
                await broadcaster.safe_emit(event, durability="delivered")
                latencies.append((perf_counter() - began) * 1e3)
    latencies.sort()
    return {
        "events": arguments.events,
        "bytes": len(orjson.dumps(event)),
        "durability": arguments.durability,
        "dumps_us": dumps / arguments.events * 1e6,
        "call_us": called / arguments.events * 1e6,
        "confirmed_per_s": arguments.events / confirmed,
        "latency_p50_ms": latencies[len(latencies) // 2],
        "latency_p99_ms": latencies[len(latencies) * 99 // 100],
    }
