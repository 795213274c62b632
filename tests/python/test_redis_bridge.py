"""Hubs that share a Redis, from Python: one stream, one numbering, and what is said when Redis is not well."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

import redis_server
from redis_server import RedisServer
from safe_broadcaster import EventBroadcaster, SafeBroadcaster, WebSocketCircuitState, get_broadcaster, stop_broadcaster
from safe_broadcaster.exceptions import BusUnavailable, ConfigError
from support import QUICK, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.skipif(not redis_server.is_there(), reason=redis_server.MISSING)

FAST: dict[str, Any] = {"port": 0, "probe_interval": 0.3, "bus_timeout": 2.0, "breaker_cooldown": 0.5}


@pytest.fixture
async def hubs(redis: RedisServer) -> AsyncIterator[tuple[EventBroadcaster, EventBroadcaster]]:
    async with EventBroadcaster(redis.url, **FAST) as one, EventBroadcaster(redis.url, **FAST) as two:
        yield one, two


class Subscriber:
    """Subscribes to everything, and comes back from where it was, at whichever hub it is told."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.statuses: list[str] = []
        self.answers: list[dict[str, Any]] = []
        self.position: dict[str, Any] | None = None

    async def read(self, url: str, upto: int) -> None:
        """Read until the event of this number is there."""
        async with connect(url, max_size=None) as ws:
            since = {} if self.position is None else {"since": self.position}
            await ws.send(json.dumps({"type": "subscribe", "data": {"events": ["*"], **since}}))
            self.answers.append(json.loads(await ws.recv()))
            if self.answers[-1].get("recovered") is not True:
                self.position = {"epoch": self.answers[-1]["epoch"], "offset": self.answers[-1]["offset"]}
            assert self.position is not None
            while not self.numbers or self.numbers[-1] < upto:
                frame = json.loads(await ws.recv())
                if frame["type"] == "event":
                    self.numbers.append(frame["data"]["data"])
                    self.position["offset"] = frame["seq"]
                elif frame["type"] == "service_status" and frame["data"]["status"] not in self.statuses[-1:]:
                    self.statuses.append(frame["data"]["status"])  # told again when the breaker opens

    async def follow(self, url: str, upto: int) -> None:
        """The same, and come back whenever the hub says so."""
        while True:
            try:
                return await self.read(url, upto)
            except (ConnectionClosed, OSError):
                await asyncio.sleep(0.02)


def bridge(hub: EventBroadcaster) -> dict[str, Any]:
    numbers: dict[str, Any] = hub.get_stats()["bridge"]
    return numbers


async def test_an_event_reaches_the_subscribers_of_all_hubs(hubs) -> None:
    one, two = hubs
    subscribers = [Subscriber(), Subscriber()]
    reading = [asyncio.create_task(s.read(hub.url, 20)) for s, hub in zip(subscribers, hubs, strict=True)]
    await eventually(lambda: all(len(s.answers) == 1 for s in subscribers))
    for n in range(21):
        assert await hubs[n % 2].broadcast("t", n) == 2, "Redis sent it to two hubs"
    await asyncio.gather(*reading)
    assert all(s.numbers == list(range(21)) for s in subscribers)
    assert (one.get_stats()["epoch"], one.get_stats()["offset"]) == (two.get_stats()["epoch"], 21)
    assert one.is_listener_healthy()
    assert not one.is_degraded()
    assert one.get_circuit_state() is WebSocketCircuitState.CLOSED


async def test_a_subscriber_recovers_at_another_hub(hubs) -> None:
    one, two = hubs
    subscriber = Subscriber()
    reading = asyncio.create_task(subscriber.read(one.url, 4))
    await eventually(lambda: subscriber.answers)
    for n in range(5):
        await one.broadcast("t", n)
    await reading
    for n in range(5, 10):
        await one.broadcast("t", n)
    await subscriber.read(two.url, 9)
    assert subscriber.answers[-1]["recovered"] is True
    assert subscriber.numbers == list(range(10))


async def test_an_emitter_moves_to_another_hub_and_nothing_is_doubled(redis, tmp_path) -> None:
    one, two = (EventBroadcaster(redis.url, **FAST) for _ in range(2))
    await one.start()
    await two.start()
    subscriber = Subscriber()
    reading = asyncio.create_task(subscriber.follow(two.url, 2999))
    await eventually(lambda: subscriber.answers)
    port = one.port
    async with SafeBroadcaster(one.url, tmp_path / "spill.db", **QUICK) as emitter:
        for n in range(3000):
            emitter.emit_nowait({"type": "t", "data": n})
            if n == 1500:
                await one.stop()  # another instance takes its place, on its port
                one = EventBroadcaster(redis.url, **{**FAST, "port": port})
                await one.start()
        assert await emitter.drain(20)
    await reading
    assert subscriber.numbers == list(range(3000))
    await one.stop()
    await two.stop()


async def test_killed_pubsub_connections_lose_nothing(redis, hubs) -> None:
    one, two = hubs
    subscriber = Subscriber()
    reading = asyncio.create_task(subscriber.follow(two.url, 299))
    await eventually(lambda: subscriber.answers)
    for n in range(300):
        if n % 60 == 30:
            redis.command("CLIENT", "KILL", "TYPE", "pubsub")
        await one.broadcast("t", n)
    await reading
    assert subscriber.numbers == list(range(300))
    # A connection that is killed before its first probe came round counts as an attempt in vain.
    await eventually(lambda: bridge(two)["up"] and bridge(two)["losses"] + bridge(two)["failures"] >= 1)


async def test_a_paused_redis_is_told_within_two_probes_and_loses_nothing(redis, hubs) -> None:
    one, two = hubs
    subscriber = Subscriber()
    reading = asyncio.create_task(subscriber.follow(two.url, 1))
    await eventually(lambda: subscriber.answers)
    await one.broadcast("t", 0)
    redis.pause()
    await eventually(lambda: subscriber.statuses == ["degraded"], 5)
    assert two.is_degraded()
    assert not two.is_listener_healthy()
    with pytest.raises(BusUnavailable, match="the bus between the hubs did not answer"):
        await one.broadcast("t", -1)
    await eventually(lambda: two.get_circuit_state() is not WebSocketCircuitState.CLOSED, 20)
    redis.resume()
    await eventually(lambda: one.is_listener_healthy() and two.is_listener_healthy(), 20)
    assert not two.is_degraded()
    await one.broadcast("t", 1)
    await reading
    assert [n for n in subscriber.numbers if n >= 0] == [0, 1]
    assert subscriber.statuses == ["degraded", "healthy"]


async def test_a_redis_that_restarts_empty_is_a_new_epoch_and_emitters_lose_nothing(redis, hubs, tmp_path) -> None:
    one, two = hubs
    subscriber = Subscriber()
    reading = asyncio.create_task(subscriber.follow(two.url, 40))
    await eventually(lambda: subscriber.answers)
    before = one.get_stats()["epoch"]
    async with SafeBroadcaster(one.url, tmp_path / "spill.db", **QUICK) as emitter:
        for n in range(20):
            await emitter.safe_emit({"type": "t", "data": n})
        assert await emitter.drain(10)
        await eventually(lambda: subscriber.numbers[-1:] == [19])
        redis.stop()
        for n in range(20, 40):
            await emitter.safe_emit({"type": "t", "data": n})
        await eventually(two.is_degraded, 10)
        redis.start()
        await eventually(lambda: two.is_listener_healthy() and two.get_stats()["epoch"] != before, 20)
        await eventually(lambda: len(subscriber.answers) > 1)
        assert await emitter.drain(20)
        await emitter.safe_emit({"type": "t", "data": 40})
    await asyncio.wait_for(reading, 20)
    # What came while the subscriber was on its way back is before its new position; it was told.
    assert subscriber.answers[-1]["recovered"] is False
    assert subscriber.answers[-1]["reason"] == "epoch"
    assert one.get_stats()["epoch"] == two.get_stats()["epoch"] != before
    stored = [frame["data"]["data"] for frame in two.get_messages_since(0)]
    assert stored == list(range(20, 41))


async def test_flushed_while_it_runs(redis, hubs) -> None:
    one, two = hubs
    await one.broadcast("t", 0)
    before = one.get_stats()["epoch"]
    redis.command("FLUSHALL")
    redis.command("SCRIPT", "FLUSH")
    await eventually(lambda: one.get_stats()["epoch"] == two.get_stats()["epoch"] != before)
    await one.broadcast("t", 1)
    await eventually(lambda: two.get_stats()["offset"] == 1)


async def test_forty_megabytes_pass_the_bound_that_redis_sets_on_subscribers(hubs) -> None:
    one, two = hubs
    pad = "x" * (4 << 20)
    await asyncio.gather(*(one.broadcast("t", {"n": n, "pad": pad}) for n in range(10)))
    small = [one.broadcast("t", {"n": n}) for n in range(10, 5000)]
    await asyncio.gather(*small)
    await eventually(lambda: two.get_stats()["offset"] == 5000, 30)
    assert bridge(two)["losses"] == 0


async def test_what_others_publish_on_the_channel_comes_in_once(redis, hubs) -> None:
    one, two = hubs
    await eventually(lambda: bridge(one)["intake"] or bridge(two)["intake"])
    subscriber = Subscriber()
    reading = asyncio.create_task(subscriber.read(two.url, 3))
    await eventually(lambda: subscriber.answers)
    for n in range(4):
        redis.command("PUBLISH", "safe_broadcaster", json.dumps({"type": "t", "data": n}))
    redis.command("PUBLISH", "safe_broadcaster", "no event")
    await reading
    assert subscriber.numbers == list(range(4))
    await eventually(lambda: bridge(one)["plain_refused"] + bridge(two)["plain_refused"] == 1)


async def test_two_applications_share_a_redis(redis) -> None:
    async with (
        EventBroadcaster(redis.url, "one", **FAST) as one,
        EventBroadcaster(redis.url, channel_name="two", **FAST) as two,
    ):
        assert await one.broadcast("t", 0) == 1
        assert (one.get_stats()["offset"], two.get_stats()["offset"]) == (1, 0)
        assert (one.channel_name, two.channel_name) == ("one", "two")


async def test_a_wrong_password_is_told_at_the_start_and_shown_nowhere(tmp_path, caplog) -> None:
    redis = RedisServer(tmp_path, "--requirepass", "s3cret")
    redis.start()
    try:
        for url in (redis.url, f"redis://:wr0ng@127.0.0.1:{redis.port}/0"):
            hub = EventBroadcaster(url, **FAST)
            with pytest.raises(BusUnavailable) as caught:
                await hub.start()
            assert str(redis.port) in str(caught.value)
            assert "wr0ng" not in str(caught.value) + repr(hub.config) + caplog.text
        async with EventBroadcaster(f"redis://:s3cret@127.0.0.1:{redis.port}/0", **FAST) as hub:
            assert await hub.broadcast("t", 0) == 1
            assert "s3cret" not in json.dumps(hub.get_stats()) + repr(hub.config)
    finally:
        redis.stop()


async def test_nobody_there_is_told_at_the_start(tmp_path) -> None:
    url = f"redis://127.0.0.1:{redis_server.free_port()}/0"
    with pytest.raises(BusUnavailable, match="cannot use the Redis at redis://127"):
        await EventBroadcaster(url, **FAST).start()
    with pytest.raises(ConfigError, match=r"log_path=.* is not allowed: give none beside redis_client"):
        await EventBroadcaster(url, log_path=tmp_path / "log.db", **FAST).start()
    for name, wrong in [("bus_down", "stop"), ("bus_timeout", 0), ("probe_interval", 0), ("channel_name", 3)]:
        with pytest.raises(ConfigError, match=rf"{name}=.* is not allowed: give "):
            await EventBroadcaster(url, **{**FAST, name: wrong}).start()


async def test_the_programs_hub_takes_a_url(redis) -> None:
    try:
        hub = await get_broadcaster(redis.url)
        assert await hub.broadcast("t", 0) == 1
    finally:
        await stop_broadcaster()
