"""Starting, stopping and forking with a Redis that is away, late, or there."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

import redis_server
from redis_server import RedisServer
from safe_broadcaster import EventBroadcaster
from safe_broadcaster.exceptions import BroadcasterClosed, BusUnavailable
from scripts import run
from support import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not redis_server.is_there(), reason=redis_server.MISSING)

FAST: dict[str, Any] = {"port": 0, "probe_interval": 0.3, "bus_timeout": 2.0, "breaker_cooldown": 0.5}
PATIENT: dict[str, Any] = {**FAST, "bus_timeout": 600.0}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Not started yet."""
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_a_start_goes_on_trying_and_begins_when_redis_does(redis) -> None:
    hub = EventBroadcaster(redis.url, **PATIENT)
    starting = asyncio.create_task(hub.start())
    second = asyncio.create_task(hub.start())  # whoever else starts it waits with the first
    await asyncio.sleep(0.5)  # whenever it comes is right
    assert not starting.done()
    redis.start()
    await asyncio.wait_for(asyncio.gather(starting, second), 20)
    assert await hub.broadcast("t", 0) == 1
    await hub.stop()


async def test_a_start_in_vain_says_what_it_tried_and_for_how_long(redis) -> None:
    with pytest.raises(BusUnavailable, match=rf"cannot use the Redis at redis://127.*{redis.port}.*tried for 2 s"):
        await EventBroadcaster(redis.url, **FAST).start()


@pytest.mark.parametrize("how", ["cancelled", "stopped"])
async def test_a_start_that_is_given_up_leaves_nothing_behind(redis, how) -> None:
    port = redis_server.free_port()
    hub = EventBroadcaster(redis.url, **{**PATIENT, "port": port})
    starting = asyncio.create_task(hub.start())
    await eventually(lambda: not is_free(port))
    if how == "cancelled":
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    else:
        await hub.stop()
        with pytest.raises(BroadcasterClosed, match="stopped while it started"):
            await starting
    await eventually(lambda: is_free(port))
    redis.start()
    await hub.start()
    assert await hub.broadcast("t", 0) == 1
    await hub.stop()


def test_a_program_that_is_told_to_end_does_not_wait_for_redis(redis, tmp_path) -> None:
    script = f"""
    async def main():
        hub = EventBroadcaster({redis.url!r}, port=0, bus_timeout=600.0)
        try: await asyncio.wait_for(hub.start(), 0.3)
        except asyncio.TimeoutError: say("done")
    asyncio.run(main())
    """
    began = time.monotonic()
    code, lines, err = run(script, tmp_path)
    assert (code, lines, err) == (0, ["done"], "")
    assert time.monotonic() - began < 30


async def test_a_hub_that_may_be_alone_starts_alone_and_joins_later(redis, caplog) -> None:
    caplog.set_level(logging.WARNING, "safe_broadcaster")
    async with EventBroadcaster(redis.url, **FAST, bus_down="local", supervision_interval=0.05) as hub:
        assert hub.is_degraded()
        assert hub.get_stats()["bridge"]["local"] is True
        assert await hub.broadcast("t", 0) == 0
        await eventually(lambda: "cut off from the other hubs: cannot use the Redis" in caplog.text)
        redis.start()
        await eventually(lambda: hub.is_listener_healthy() and not hub.get_stats()["bridge"]["local"])
        await eventually(lambda: "one with the other hubs again" in caplog.text)
        async with EventBroadcaster(redis.url, **FAST) as other:
            assert await other.broadcast("t", 1) == 2


async def test_a_hub_that_stops_hands_over_what_it_held(redis) -> None:
    redis.start()
    rare = {**FAST, "probe_interval": 20.0}
    one, two = (EventBroadcaster(redis.url, **rare) for _ in range(2))
    await one.start()
    await eventually(lambda: one.get_stats()["bridge"]["intake"])
    await two.start()
    await one.stop()
    await eventually(lambda: two.get_stats()["bridge"]["intake"])
    redis.command("PUBLISH", "safe_broadcaster", '{"type": "t"}')
    await eventually(lambda: two.get_stats()["offset"] == 1)
    await two.stop()


async def test_a_hub_stops_while_redis_hangs(redis) -> None:
    redis.start()
    hub = EventBroadcaster(redis.url, **PATIENT)
    await hub.start()
    redis.pause()
    publishing = asyncio.create_task(hub.broadcast("t", 0))
    await asyncio.sleep(0)
    await asyncio.wait_for(hub.stop(), 20)
    with pytest.raises((BusUnavailable, BroadcasterClosed)):
        await publishing
    redis.resume()


def test_a_forked_child_disturbs_neither_the_bridge_nor_redis(redis, tmp_path) -> None:
    redis.start()
    script = f"""
    async def main():
        async with EventBroadcaster({redis.url!r}, port=0, probe_interval=0.3) as hub:
            await hub.broadcast("t", 0)
            pid = os.fork()
            if pid == 0:
                try: hub.get_stats()
                except ForkedProcess: os._exit(0)
                finally: os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0
            for n in range(20):
                await hub.broadcast("t", n)
                await asyncio.sleep(0.05)
            bridge = hub.get_stats()["bridge"]
            say(bridge["losses"], bridge["failures"], bridge["deaf"], hub.get_stats()["offset"])
    asyncio.run(main())
    """
    code, lines, err = run(script, tmp_path)
    assert (code, lines, err) == (0, ["0 0 0 21"], "")
