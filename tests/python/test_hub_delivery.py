"""To whom events go beside their type and topic, and in what."""

from __future__ import annotations

import asyncio

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from asgi import frame, subscribe, subscriber
from safe_broadcaster import EventBroadcaster, EventNotSerializable


async def test_an_event_is_found_by_the_ids_that_it_names() -> None:
    keys = {"characteristic_ids": "characteristic/{id}"}
    async with (
        EventBroadcaster(port=0, entity_keys=keys) as hub,
        subscriber(hub.url, "characteristic/7") as (seven, position),
        subscriber(hub.url, "characteristic/*") as (each, _),
        connect(hub.url) as late,
    ):
        assert await hub.broadcast("sample", {"characteristic_ids": [3, 7], "value": 1}) == 2
        assert await hub.broadcast("sample", {"characteristic_ids": 3, "value": 2}) == 1
        assert await hub.broadcast_event({"type": "violation", "characteristic_ids": ["7"]}) == 2
        assert await hub.broadcast("sample", {"characteristic_id": 7}) == 0
        assert [(await frame(seven))["seq"] for _ in range(2)] == [1, 3]
        assert [(await frame(each))["seq"] for _ in range(3)] == [1, 2, 3]
        since = {"epoch": position["epoch"], "offset": 0}
        assert (await subscribe(late, "characteristic/7", since=since))["replayed"] == 2
        with pytest.raises(EventNotSerializable, match="1024 entities, not 1025"):
            await hub.broadcast("sample", {"characteristic_ids": list(range(1025))})


async def test_a_page_that_knows_no_frames_gets_events_alone() -> None:
    async with EventBroadcaster(port=0, envelope="raw") as hub, connect(hub.url) as page:
        assert (await subscribe(page, "a"))["action"] == "subscribed"
        await hub.broadcast("a", 1)
        await hub.broadcast("b", 2)
        await hub.broadcast("a", 3)
        assert [await frame(page) for _ in range(2)] == [{"type": "a", "data": 1}, {"type": "a", "data": 3}]
        stopping = asyncio.create_task(hub.stop())
        with pytest.raises(ConnectionClosed) as closed:
            await frame(page)
        assert closed.value.rcvd.code == 3001
        await stopping
