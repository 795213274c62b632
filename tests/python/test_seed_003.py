"""Calling code of an aggregator with queued emitters works as it is written; only the imports differ.

Redis and the WebSocket library of the original are stood in for by objects with the same calls.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.client import connect as websockets_connect
from websockets.asyncio.server import serve

from safe_broadcaster import Aggregator as BraidAggregator
from safe_broadcaster import CircuitBreaker
from support import eventually
from virtual import now, virtual


class Redis:
    def __init__(self) -> None:
        self.published: list[tuple[str, str]] = []
        self.down = False

    async def publish(self, channel: str, text: str) -> None:
        if self.down:
            raise ConnectionError("no redis")
        self.published.append((channel, text))


@asynccontextmanager
async def websocket_server():
    received = []

    async def receive(connection) -> None:
        async for message in connection:
            received.append(json.loads(message))  # noqa: PERF401 - one by one, as they come

    async with serve(receive, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", received


async def test_a_websocket_emitter_and_a_larger_queue() -> None:
    async with websocket_server() as (url, received):
        async with websockets_connect(url) as websocket:

            async def websocket_emitter(event) -> None:
                await websocket.send(json.dumps(event))

            aggregator = BraidAggregator(
                event_emitter=websocket_emitter,
                event_queue_size=5000,  # Larger queue
            )
            async with aggregator as agg:
                agg.observe("lambda_max", 0.9)
                await eventually(lambda: received)
        assert received[0]["type"] == "aggregate.novelty"


@virtual
async def test_a_message_bus_emitter() -> None:
    redis_client = Redis()

    async def redis_emitter(event) -> None:
        await redis_client.publish("novelty_events", json.dumps(event))

    aggregator = BraidAggregator(event_emitter=redis_emitter)
    async with aggregator as agg:
        agg.observe("lambda_max", 0.9)
        await asyncio.sleep(1)
    ((channel, text), *_) = redis_client.published
    assert (channel, json.loads(text)["content"]["activity"]) == ("novelty_events", 0.9)


async def test_the_complete_setup_emits_to_both_and_one_that_fails_does_not_stop_the_other() -> None:
    redis, ran = Redis(), []
    redis.down = True

    class ProductionEventEmitter:
        def __init__(self) -> None:
            self.redis = None
            self.websocket = None

        async def setup(self) -> None:
            self.redis = redis
            self.websocket = await websockets_connect(url)

        async def emit(self, event) -> None:
            # Dual emission for redundancy
            await asyncio.gather(
                self.redis.publish("braid.novelty", json.dumps(event)),
                self.websocket.send(json.dumps(event)),
                return_exceptions=True,
            )

    async def run_application() -> None:
        agg.observe("lambda_max", 0.9)
        await eventually(lambda: received)
        ran.append(True)

    async with websocket_server() as (url, received):
        emitter = ProductionEventEmitter()
        await emitter.setup()

        aggregator = BraidAggregator(
            novelty_threshold=0.75,
            event_emitter=emitter.emit,
            event_queue_size=10000,  # Handle bursts
        )

        # Use as context manager for clean shutdown
        async with aggregator as agg:
            await run_application()
        await emitter.websocket.close()
    assert ran == [True]
    assert len(received) == 1
    assert aggregator.get_stats()["queue"]["emitters"].popitem()[1]["emitted"] == 1


STATUS = """
{
  "status": {
    "circuit_breaker": {
      "enabled": true,
      "tripped": false,
      "consecutive_errors": 0,
      "max_consecutive_errors": 5,
      "trip_time": null
    },
    "adaptive_intervals": {
      "micro": 0.08,
      "meso": 10.0,
      "macro": 300.0
    },
    "event_queue_size": 0,
    "last_emission": "2024-01-03T10:30:45Z"
  }
}
"""


def shape(value):
    """Names, their order, and the types of values; a time by its form."""
    if isinstance(value, dict):
        return [(name, shape(each)) for name, each in value.items()]
    if isinstance(value, str):
        return "".join("0" if character.isdigit() else character for character in value)
    return type(value)


@virtual
async def test_the_status_has_the_seeds_shape_to_the_letter() -> None:
    redis = Redis()
    async with BraidAggregator(event_emitter=lambda event: redis.publish("c", json.dumps(event))) as agg:
        agg.observe("lambda_max", 0.9)
        await asyncio.sleep(0.11)
        while not redis.published:  # a plain function runs in a thread
            await asyncio.sleep(0)
        status = json.loads(json.dumps(agg.get_status()))
    wanted = json.loads(STATUS)
    assert shape(status) == shape(wanted)
    for name in ("circuit_breaker", "adaptive_intervals", "event_queue_size"):
        assert status["status"][name] == pytest.approx(wanted["status"][name])


@virtual
async def test_quiet_slows_down_and_a_spike_speeds_up_as_in_the_seeds_example() -> None:
    agg = BraidAggregator()
    seen: list[float] = []

    async def application(activity: float, seconds: float) -> list[float]:
        seen.clear()
        end = now() + seconds
        while now() < end:
            agg.observe("lambda_max", activity)
            await asyncio.sleep(0.01)
            current = agg.get_status()["status"]["adaptive_intervals"]["micro"]
            if not seen or seen[-1] != current:
                seen.append(current)
        return seen

    async with agg:
        quiet = list(await application(0.1, 20))
        assert quiet[:3] == [pytest.approx(each) for each in (0.1, 0.12, 0.144)]
        assert quiet[-1] == 1.0
        spike = list(await application(0.9, 20))
        assert spike[:3] == [pytest.approx(each) for each in (1.0, 0.8, 0.64)]
        assert spike[-1] == 0.05


@virtual
async def test_five_errors_skip_all_aggregations_for_sixty_seconds_and_then_it_heals_itself(caplog) -> None:
    caplog.set_level(logging.CRITICAL)
    calls: list[float] = []

    async def aggregate(window, before):
        calls.append(now())
        if now() < 30:
            raise RuntimeError("no data source")
        return 0.0, 0.0, {}

    clock = asyncio.get_running_loop().time
    async with BraidAggregator(aggregate=aggregate, circuit_breaker=CircuitBreaker(clock=clock)) as agg:
        await asyncio.sleep(1)
        status = agg.get_status()["status"]["circuit_breaker"]
        assert (status["tripped"], status["consecutive_errors"], len(calls)) == (True, 5, 5)
        assert status["trip_time"] is not None
        await asyncio.sleep(59)
        assert len(calls) == 5
        await asyncio.sleep(2)
        status = agg.get_status()["status"]["circuit_breaker"]
        assert (status["tripped"], status["consecutive_errors"], status["trip_time"]) == (False, 0, None)
        assert len(calls) > 5
