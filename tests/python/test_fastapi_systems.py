"""The FastAPI application with everything around the hub, with a real server, real clients and an engine's process."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from asgi import Server, frame, get, loaded, post, subscriber
from support import eventually


@pytest.fixture
def example():
    with loaded("fastapi_systems") as module:
        yield module


@pytest.fixture
def server(example):
    with Server(example.app, lifespan="on") as server:
        yield server


def of_type(hub, kind: str) -> list[dict]:
    events = [message["data"] for message in hub.get_messages_since(0)]
    return [event["data"] for event in events if event.get("type") == kind]


async def test_routes_and_webhooks_are_on_every_dashboard_at_once(server) -> None:
    async with (
        subscriber(server.url("/hub/ws"), "item_update", "webhook_received") as (one, _),
        subscriber(server.url("/hub/ws"), "item_update", "webhook_received") as (other, _),
    ):
        status, item = await post(server, "/items", {"name": "lamp"})
        assert (status, item) == (200, {"name": "lamp", "id": 1})
        assert await post(server, "/webhook", {"action": "opened"}) == (200, {"action": "opened"})
        for dashboard in (one, other):
            assert (await frame(dashboard))["data"] == {"type": "item_update", "data": item}
            assert (await frame(dashboard))["data"] == {"type": "webhook_received", "data": {"action": "opened"}}


async def test_a_webhook_that_fails_is_logged_and_does_not_fail_its_sender(server, caplog) -> None:
    assert await post(server, "/webhook", {}) == (200, None)
    assert "KeyError: 'action'" in caplog.text


async def test_the_queue_is_told_at_once_and_polled_in_case_it_was_not(server, example) -> None:
    await eventually(lambda: of_type(example.hub, "queue_update") == [[]])
    assert await post(server, "/phases", {"n": 1}) == (200, {"phases": 1})
    assert of_type(example.hub, "queue_update") == [[], [{"n": 1}]]
    example.phases.append({"n": 2})  # behind its back
    await eventually(lambda: of_type(example.hub, "queue_update")[-1] == [{"n": 1}, {"n": 2}])
    assert len(of_type(example.hub, "queue_update")) == 3


async def test_a_status_is_sent_once_and_the_load_only_to_those_who_listen(server, example) -> None:
    await eventually(lambda: of_type(example.hub, "system_status"))
    [status, load, _] = json.loads(await get(server, "/sources"))
    assert (status["emitted"], load["emitted"], load["rounds"]) == (1, 0, 0)
    async with subscriber(server.url("/hub/ws"), "system/*") as (dashboard, _):
        assert (await frame(dashboard))["data"] == {
            "type": "load_update",
            "data": {"requests": 1},
            "topic": "system/load",
        }
    assert len(of_type(example.hub, "system_status")) == 1


async def test_an_engine_in_another_process_beats_and_ticks(server, example, tmp_path) -> None:
    async with subscriber(server.url("/hub/ws"), "graph.delta.*") as (dashboard, _):
        arguments = [example.__file__, server.url("/hub/ws"), str(tmp_path / "engine.db")]
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments)
        try:
            events = [(await frame(dashboard))["data"] for _ in range(3)]
        finally:
            process.kill()
            await process.wait()
        assert sorted(event["type"] for event in events) == ["graph.delta.heartbeat"] + ["graph.delta.node.upsert"] * 2
        [beat] = [event for event in events if event["type"] == "graph.delta.heartbeat"]
        assert beat["content"]["citizen_id"] == "ada"


async def test_the_page_is_served_below_the_mount_and_finds_the_hub_there(server) -> None:
    assert "location.pathname" in await get(server, "/hub/")


def test_all_of_it_stops_with_the_server(example) -> None:
    with Server(example.app, lifespan="on"):
        assert {source["state"] for source in example.tasks.status()} == {"running"}
    assert {source["state"] for source in example.tasks.status()} == {"stopped"}
    assert not example.hub.is_listener_healthy()
