"""The FastAPI example and its document do what they say, with a real server and a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import textwrap

import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from starlette.applications import Starlette
from starlette.routing import Mount
from websockets.asyncio.client import connect

import safe_broadcaster
from asgi import Server, frame, get, loaded, post, subscriber
from safe_broadcaster import EventBroadcaster
from support import eventually
from test_docs import snippets


@pytest.fixture
def example():
    with loaded("fastapi_hub") as module:
        yield module


@pytest.fixture
def server(example):
    with Server(example.app, lifespan="on") as server:
        yield server


async def test_a_route_broadcasts_to_dashboards_on_the_same_port(server) -> None:
    async with (
        subscriber(server.url("/hub/ws"), "alert.*", subprotocols=["sb.v1.json"]) as (dashboard, _),
        connect(server.url("/alerts")) as silent,
    ):
        alert = {"severity": "high", "message": "door open"}
        want = {"type": "alert.created", "data": alert}
        status, answer = await post(server, "/alerts", alert)
        assert status == 200
        assert answer["dashboards"] >= 1
        assert (await frame(dashboard))["data"] == want
        if answer["dashboards"] == 2:  # the second one may have come a moment later
            assert (await frame(silent))["data"] == want
        assert (await post(server, "/alerts", {"severity": "high"}))[0] == 422


async def test_an_engine_in_another_process_emits_into_it(server, example, tmp_path) -> None:
    async with subscriber(server.url("/hub/ws"), "engine.*") as (dashboard, _):
        arguments = [example.__file__, server.url("/hub/ws"), str(tmp_path / "engine.db")]
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments)
        try:
            first = (await frame(dashboard))["data"]
            assert first == {"type": "engine.heartbeat", "content": {"tick": 0}}
            assert (await frame(dashboard))["data"]["content"]["tick"] == 1
        finally:
            process.kill()
            await process.wait()
        await eventually(lambda: example.hub.get_stats()["emitters"] == 0)


async def test_the_page_is_served(server) -> None:
    assert "/hub/ws" in await get(server, "/")


def test_the_hub_stops_with_the_server(example) -> None:
    with Server(example.app, lifespan="on"):
        assert example.hub.is_listener_healthy()
    assert not example.hub.is_listener_healthy()


SNIPPETS = snippets("docs/fastapi.md")


def compiled(code: str):
    return compile(code, "snippet", "exec", dont_inherit=True)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
async def test_every_snippet_of_the_document_runs(number) -> None:
    names = {name: getattr(safe_broadcaster, name) for name in safe_broadcaster.__all__}
    names |= {"Starlette": Starlette, "Mount": Mount, "get_asgi_application": FastAPI}  # Django's, in a test without it
    names |= {"FastAPI": FastAPI, "WebSocket": WebSocket, "WebSocketDisconnect": WebSocketDisconnect}

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with scope["hub"]:
            yield

    scope = {**names, "lifespan": lifespan, "app": FastAPI(), "hub": EventBroadcaster(port=0), "__name__": "snippet"}
    code = SNIPPETS[number].replace("port=8000", "port=0")
    if re.search(r"^(await|async with) ", code, re.MULTILINE):
        exec(compiled("async def main():\n" + textwrap.indent(code, "    ")), scope)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(scope["hub"])
            await scope["main"]()
        return
    exec(compiled(code), scope)
    with Server(scope.get("application", scope["app"]), lifespan="on") as server:
        hub = scope["hub"]
        if not hub.get_stats()["running"]:
            await hub.start()
        paths = ["/hub/ws"] if "asgi()" in code else [route.path for route in scope["app"].routes[4:]]
        for path in paths:
            async with subscriber(server.url(path), "alert.*") as (ws, _):
                await hub.broadcast("alert.disk", {"severity": "high", "message": "m"})
                assert (await frame(ws))["data"]["type"] == "alert.disk"
    await hub.stop()
