"""A hub watches heartbeats: who is active, late or dead is in its numbers, and told to whoever listens."""

from __future__ import annotations

import asyncio
import sys
import urllib.request

import pytest

from asgi import frame, subscriber
from safe_broadcaster import ConfigError, EventBroadcaster, Heartbeat
from support import eventually

QUICK = {"presence_late": 2.0, "presence_dead": 4.0}
TOPIC = "graph/ada/delta/heartbeat"


def presence(hub: EventBroadcaster) -> tuple[int, int, int]:
    numbers = hub.get_stats()["presence"]
    return numbers["active"], numbers["late"], numbers["dead"]


async def told(ws, state: str) -> dict:
    """Wait for the news that it is in this state; only "late", which a busy hub may skip, may come before."""
    while (event := (await frame(ws))["data"])["type"] == "presence.late" and state != "late":
        assert event["data"]["silent"] > QUICK["presence_late"]
    assert (event["type"], event["data"]["state"]) == (f"presence.{state}", state)
    return event["data"]


async def test_an_engine_that_falls_silent_is_late_then_dead_and_active_when_it_is_back(make) -> None:
    async with (
        EventBroadcaster(port=0, **QUICK) as hub,
        subscriber(hub.url, "presence.*") as (ws, _),
    ):
        broadcaster = make(hub.client, emitter_id="engines")
        await broadcaster.start()
        heartbeat = Heartbeat(broadcaster, "ada", interval=0.2)
        await heartbeat.start()
        active = await told(ws, "active")
        assert (active["emitter"], active["topic"], active["alert"]) == ("engines", TOPIC, False)
        assert active["silent"] < 2, "presence within two seconds of the first beat"

        heartbeat._task.cancel()  # it dies
        dead = await told(ws, "dead")
        assert dead["silent"] > QUICK["presence_dead"]
        assert dead["alert"]
        assert presence(hub) == (0, 0, 1)
        [heart] = hub.get_stats()["presence"]["hearts"]
        assert (heart["emitter"], heart["topic"], heart["state"]) == ("engines", TOPIC, "dead")

        await heartbeat.start()
        await told(ws, "active")
        await heartbeat.stop()
        assert not (await told(ws, "gone"))["alert"]
        assert presence(hub) == (0, 0, 0), "who takes leave is not dead"


async def test_news_of_an_engine_come_on_the_topic_of_its_heartbeats(make) -> None:
    async with EventBroadcaster(port=0, **QUICK) as hub, subscriber(hub.url, "graph/ada/*") as (ws, _):
        broadcaster = make(hub.url)
        await broadcaster.start()
        async with Heartbeat(broadcaster, "ada"), Heartbeat(broadcaster, "atlas"):
            kinds = [(await frame(ws))["data"]["type"] for _ in range(2)]
        assert kinds == ["graph.delta.heartbeat", "presence.active"]


ENGINE = """
import asyncio, sys
from safe_broadcaster import Heartbeat, SafeBroadcaster

async def main():
    async with SafeBroadcaster(sys.argv[1], sys.argv[2], emitter_id="engine") as broadcaster:
        async with Heartbeat(broadcaster, "ada", interval=0.2):
            await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_killed_process_is_dead_until_the_next_one_beats(tmp_path) -> None:
    async with (
        EventBroadcaster(port=0, **QUICK) as hub,
        subscriber(hub.url, "presence.*") as (ws, _),
    ):
        for _ in range(2):
            engine = await asyncio.create_subprocess_exec(
                sys.executable, "-c", ENGINE, hub.url, str(tmp_path / "engine.db")
            )
            try:
                await told(ws, "active")
            finally:
                engine.kill()
                await engine.wait()
            assert (await told(ws, "dead"))["emitter"] == "engine"


async def test_engines_without_heartbeats_are_nobodys_concern_and_watching_can_be_turned_off(make) -> None:
    async with EventBroadcaster(port=0, presence_events=(), **QUICK) as hub:
        broadcaster = make(hub.client)
        await broadcaster.start()
        async with Heartbeat(broadcaster, "ada"):
            assert await broadcaster.drain(5)
            assert presence(hub) == (0, 0, 0)
    async with EventBroadcaster(port=0, **QUICK) as hub:
        broadcaster = make(hub.client)
        await broadcaster.start()
        await broadcaster.safe_emit({"type": "graph.delta.node.upsert", "topic": TOPIC})
        assert await broadcaster.drain(5)
        assert presence(hub) == (0, 0, 0)


async def test_presence_is_watched_with_a_log_on_disk_and_shown_to_prometheus(make, tmp_path) -> None:
    async with EventBroadcaster(port=0, log_path=tmp_path / "log.db", presence_events=["*.beat"], **QUICK) as hub:
        broadcaster = make(hub.client)
        await broadcaster.start()
        await broadcaster.safe_emit({"type": "my.beat"})
        await eventually(lambda: presence(hub) == (0, 0, 1))

        def read() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{hub.port}/metrics") as answer:
                return answer.read().decode()

        assert 'safe_broadcaster_hub_presence{state="dead"} 1' in await asyncio.to_thread(read)

        def kinds() -> list[str]:
            return [message["data"]["type"] for message in hub.get_messages_since(0)]

        await eventually(lambda: kinds()[-1] == "presence.dead")
        assert kinds()[0] == "my.beat"


@pytest.mark.parametrize(
    "wrong",
    [{"presence_late": 0}, {"presence_dead": 45.0}, {"presence_dead": float("nan")}, {"presence_events": [""]}],
)
async def test_wrong_settings_are_named(wrong) -> None:
    hub = EventBroadcaster(port=0, **wrong)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        await hub.start()
