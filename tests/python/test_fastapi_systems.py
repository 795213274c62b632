"""The FastAPI application with everything around the hub, with a real server, real clients and an engine's process."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import urllib.request
from pathlib import Path

import pytest

from asgi import Server, frame, subscriber
from support import eventually

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_systems.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("fastapi_systems", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # FastAPI looks annotations up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def server(example):
    with Server(example.app, lifespan="on") as server:
        yield server


def get(server, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}") as answer:
        return answer.read()


def post(server, path: str, body: object) -> dict:
    address = f"http://127.0.0.1:{server.port}{path}"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def of_type(hub, kind: str) -> list[dict]:
    events = [message["data"] for message in hub.get_messages_since(0)]
    return [event["data"] for event in events if event.get("type") == kind]


async def test_routes_and_webhooks_are_on_every_dashboard_at_once(server) -> None:
    async with (
        subscriber(server.url("/hub/ws"), "item_update", "webhook_received") as (one, _),
        subscriber(server.url("/hub/ws"), "item_update", "webhook_received") as (other, _),
    ):
        item = await asyncio.to_thread(post, server, "/items", {"name": "lamp"})
        assert item == {"name": "lamp", "id": 1}
        assert await asyncio.to_thread(post, server, "/webhook", {"action": "opened"}) == {"action": "opened"}
        for dashboard in (one, other):
            assert (await frame(dashboard))["data"] == {"type": "item_update", "data": item}
            assert (await frame(dashboard))["data"] == {"type": "webhook_received", "data": {"action": "opened"}}


async def test_a_webhook_that_fails_is_logged_and_does_not_fail_its_sender(server, caplog) -> None:
    assert await asyncio.to_thread(post, server, "/webhook", {}) is None
    assert "KeyError: 'action'" in caplog.text


async def test_the_queue_is_told_at_once_and_polled_in_case_it_was_not(server, example) -> None:
    await eventually(lambda: of_type(example.hub, "queue_update") == [[]])
    assert await asyncio.to_thread(post, server, "/phases", {"n": 1}) == {"phases": 1}
    assert of_type(example.hub, "queue_update") == [[], [{"n": 1}]]
    example.phases.append({"n": 2})  # behind its back
    await eventually(lambda: of_type(example.hub, "queue_update")[-1] == [{"n": 1}, {"n": 2}])
    assert len(of_type(example.hub, "queue_update")) == 3


async def test_a_status_is_sent_once_and_the_load_only_to_those_who_listen(server, example) -> None:
    await eventually(lambda: of_type(example.hub, "system_status"))
    [status, load, _] = json.loads(await asyncio.to_thread(get, server, "/sources"))
    assert (status["emitted"], load["emitted"], load["rounds"]) == (1, 0, 0)
    async with subscriber(server.url("/hub/ws"), "system/*") as (dashboard, _):
        assert (await frame(dashboard))["data"] == {
            "type": "load_update",
            "data": {"requests": 1},
            "topic": "system/load",
        }
    assert len(of_type(example.hub, "system_status")) == 1


async def test_an_engine_in_another_process_beats_and_ticks(server, tmp_path) -> None:
    async with subscriber(server.url("/hub/ws"), "graph.delta.*") as (dashboard, _):
        arguments = [str(EXAMPLE), server.url("/hub/ws"), str(tmp_path / "engine.db")]
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
    page = (await asyncio.to_thread(get, server, "/hub/")).decode()
    assert "location.pathname" in page


def test_all_of_it_stops_with_the_server(example) -> None:
    with Server(example.app, lifespan="on"):
        assert {source["state"] for source in example.tasks.status()} == {"running"}
    assert {source["state"] for source in example.tasks.status()} == {"stopped"}
    assert not example.hub.is_listener_healthy()
