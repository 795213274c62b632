"""Hubs that share a Redis all know the same engines, and tell of each change once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import redis_server
from safe_broadcaster import EventBroadcaster, Heartbeat
from support import eventually

pytestmark = pytest.mark.skipif(not redis_server.is_there(), reason=redis_server.MISSING)

QUICK: dict[str, Any] = {"port": 0, "presence_late": 1.0, "presence_dead": 2.0, "probe_interval": 0.3}
GRACE = 5.0
"""Seconds after which another hub would tell what the one that knows has not told."""
TOPIC = "graph/ada/delta/heartbeat"


def states(hub: EventBroadcaster) -> list[tuple[str, str]]:
    hearts = hub.get_stats()["presence"]["hearts"]
    return [(heart["emitter"], heart["state"]) for heart in hearts if heart["topic"] == TOPIC]


def told(hub: EventBroadcaster) -> list[str]:
    """What was told of it in the stream, without a lateness that a busy machine skips or adds."""
    events = [message["data"] for message in hub.get_messages_since(0)]
    kinds = [event["type"] for event in events if event["type"].startswith("presence.")]
    return [kind for kind in kinds if kind != "presence.late"]


async def test_an_engine_at_one_hub_is_known_to_the_other_and_each_change_is_told_once(redis, make) -> None:
    async with EventBroadcaster(redis.url, **QUICK) as one, EventBroadcaster(redis.url, **QUICK) as two:
        broadcaster = make(one.url, emitter_id="engine")
        await broadcaster.start()
        heartbeat = Heartbeat(broadcaster, "ada", interval=0.2)
        await heartbeat.start()
        for hub in (one, two):
            await eventually(lambda hub=hub: states(hub) == [("engine", "active")])

        heartbeat._task.cancel()  # it dies
        for hub in (one, two):
            await eventually(lambda hub=hub: states(hub) == [("engine", "dead")])
        await asyncio.sleep(GRACE + 2)  # by then the other hub would have told it too
        assert told(two) == ["presence.active", "presence.dead"]

        await heartbeat.start()
        await eventually(lambda: told(two)[2:] == ["presence.active"])
        await heartbeat.stop()
        for hub in (one, two):
            await eventually(lambda hub=hub: states(hub) == [])
        await eventually(lambda: told(two)[3:] == ["presence.gone"])


async def test_an_engine_that_dies_with_its_hub_is_told_of_by_the_other(redis, make) -> None:
    async with EventBroadcaster(redis.url, **QUICK) as two:
        async with EventBroadcaster(redis.url, **QUICK) as one:
            broadcaster = make(one.url, emitter_id="engine")
            await broadcaster.start()
            heartbeat = Heartbeat(broadcaster, "ada", interval=0.2)
            await heartbeat.start()
            await eventually(lambda: states(two) == [("engine", "active")])
            heartbeat._task.cancel()
        await eventually(lambda: told(two) == ["presence.active", "presence.dead"])
