"""The hub's durable log from Python: what survives a restart, and what is said if the file cannot be used."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib

import pytest
from websockets.asyncio.client import connect

from safe_broadcaster import SafeBroadcaster
from safe_broadcaster.exceptions import BroadcasterClosed, ConfigError, SpillCorrupt, SpillLocked
from safe_broadcaster.hub import EventBroadcaster


async def read(url, since, count):
    """The answer to a subscription, and the data of the events that follow."""
    async with connect(url) as ws:
        await ws.send(json.dumps({"type": "subscribe", "data": {"events": ["*"], "since": since}}))
        answer = json.loads(await ws.recv())
        return answer, [json.loads(await ws.recv())["data"] for _ in range(count)]


@pytest.mark.parametrize("kind", [str, pathlib.Path])
async def test_positions_survive_a_restart(tmp_path, kind):
    hub = EventBroadcaster(port=0, log_path=kind(tmp_path / "hub.db"))
    async with hub:
        for n in range(3):
            assert await hub.broadcast("t", n) == 0
        before = hub.get_stats()
    assert (before["durable"], before["degraded"], before["offset"]) == (True, False, 3)
    async with hub:
        assert hub.get_stats()["epoch"] == before["epoch"]
        await hub.broadcast("t", 3)
        answer, events = await read(hub.url, {"epoch": before["epoch"], "offset": 1}, 3)
    assert answer["recovered"] is True
    assert [event["data"] for event in events] == [1, 2, 3]


async def test_publishing_waits_for_the_disk_and_not_the_loop(tmp_path):
    async with EventBroadcaster(port=0, log_path=tmp_path / "hub.db") as hub:
        epoch = hub.get_stats()["epoch"]
        await asyncio.gather(*(hub.broadcast("t", n) for n in range(2000)))
        stats = hub.get_stats()
        assert stats["offset"] == 2000
        assert stats["log_commits"] < 2000, "many events share a transaction"
        _, events = await read(hub.url, {"epoch": epoch, "offset": 0}, 2000)
        assert [event["data"] for event in events] == list(range(2000))


async def test_an_emitter_of_the_same_process_is_known_again(tmp_path):
    hub = EventBroadcaster(port=0, log_path=tmp_path / "hub.db")
    await hub.start()
    async with SafeBroadcaster(hub.client, spill_path=tmp_path / "spill.db") as emitter:
        for n in range(3):
            await hub.start()
            await emitter.safe_emit({"type": "t", "data": n}, durability="delivered")
            await hub.stop()
        async with hub:
            stats = hub.get_stats()
            assert (stats["offset"], stats["known_emitters"]) == (3, 1)
            _, events = await read(hub.url, {"epoch": stats["epoch"], "offset": 0}, 3)
    assert [event["data"] for event in events] == [0, 1, 2]


async def test_publishing_while_the_hub_stops_is_answered(tmp_path):
    hub = EventBroadcaster(port=0, log_path=tmp_path / "hub.db")
    await hub.start()
    publishing = asyncio.gather(*(hub.broadcast("t", n) for n in range(500)), return_exceptions=True)
    await asyncio.sleep(0)
    stopping = asyncio.create_task(hub.stop())
    outcomes = await publishing
    await stopping
    assert all(outcome == 0 or isinstance(outcome, BroadcasterClosed) for outcome in outcomes)
    with pytest.raises(BroadcasterClosed):
        await hub.broadcast("t", 0)


async def test_a_log_has_one_owner(tmp_path):
    path = tmp_path / "hub.db"
    async with EventBroadcaster(port=0, log_path=path):
        second = EventBroadcaster(port=0, log_path=path)
        with pytest.raises(SpillLocked, match=rf"log_path .*owned by process {os.getpid()}"):
            await second.start()


async def test_a_path_that_cannot_be_used_is_named_with_the_remedy(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("not a database " * 500)
    for path, words in [
        (tmp_path, "is a directory"),
        (tmp_path / "missing" / "hub.db", "directory does not exist"),
        (notes, "choose another path"),
    ]:
        with pytest.raises(SpillCorrupt, match=words):
            await EventBroadcaster(port=0, log_path=path).start()
    with pytest.raises(ConfigError, match="log_path=3 is not allowed: give a path, or None"):
        await EventBroadcaster(port=0, log_path=3).start()
