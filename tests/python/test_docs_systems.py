"""What the pages on the event bus and the aggregator show works as it is shown."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import json
import re

import pytest
from fastapi import FastAPI, WebSocket
from prometheus_client import REGISTRY
from websockets.asyncio.client import connect

import safe_broadcaster
from asgi import Server
from safe_broadcaster import BackgroundTasks, ConnectionManager, EventBus, TimeScale, sources
from safe_broadcaster.bus import ManagerConfig
from support import eventually
from test_docs import ROOT, load, snippets


class Socket:
    """Takes everything."""

    async def send(self, _: str) -> None:
        """Take a text."""


def run_snippets(document: str, **names: object):
    """Run all snippets of a document in one namespace, as a reader would; returns the namespace."""

    async def main() -> dict:
        scope = {name: getattr(safe_broadcaster, name) for name in safe_broadcaster.__all__} | names
        for code in snippets(document):
            compiled = compile(code, document, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            steps = eval(compiled, scope)
            if steps is not None:
                await steps
        return scope

    return main()


async def test_the_snippets_of_the_bus(caplog) -> None:
    names = {"FastAPI": FastAPI, "WebSocket": WebSocket, "dataclass": dataclasses.dataclass, "__name__": "snippets"}
    scope = await run_snippets("docs/bus.md", **names)
    with Server(scope["app"]) as server:
        async with connect(server.url("/ws")) as client:
            await client.send('{"type":"subscribe","characteristic_ids":[5]}')
            assert json.loads(await client.recv())["type"] == "subscribed"
            await scope["measured"]()
            assert json.loads(await client.recv())["payload"]["mean"] == 9.98
            await scope["bus"].publish(scope["Temperature"](5, 20.5))
            while (message := json.loads(await client.recv()))["type"] != "temperature":
                pass  # two broadcasters listen by now
            assert message["payload"] == {"characteristic_id": 5, "celsius": 20.5}
    assert len(scope["alert_manager"].notifiers) == 1
    assert caplog.text == ""


async def test_the_snippets_of_the_aggregator(caplog) -> None:
    sent = []

    async def emit(event: object) -> None:
        sent.append(event)

    async def run_application() -> None:
        await eventually(lambda: sent or asyncio.get_running_loop().time())

    names = {"redis_emitter": emit, "send_mail": emit, "run_application": run_application, "json": json}
    scope = await run_snippets("docs/aggregator.md", websocket=Socket(), **names)
    assert set(scope["status"]["status"]) == {
        "circuit_breaker", "adaptive_intervals", "event_queue_size", "last_emission",
    }  # fmt: skip
    assert sent == [{"type": "novelty", "content": {"n": 1}}, "hello"]
    assert scope["interval"].current < 0.1
    assert REGISTRY.get_sample_value(
        "safe_broadcaster_emitter_events_total", {"emitter": "redis", "outcome": "emitted"}
    )
    assert caplog.text == ""


def test_the_table_of_scales_is_that_of_the_code() -> None:
    text = (ROOT / "docs/aggregator.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    seconds = {"s": 1, "min": 60}

    def number(cell: str) -> float:
        value, _, unit = cell.partition(" ")
        return float(value) * seconds.get(unit, 1)

    for scale in TimeScale:
        assert tuple(map(number, rows[scale.value].split(" | "))) == safe_broadcaster.aggregator.PACES[scale]


def test_every_setting_of_the_connection_manager_has_its_reason_and_its_row() -> None:
    lines = (ROOT / "python/safe_broadcaster/bus/connections.py").read_text().splitlines()
    text = (ROOT / "docs/bus.md").read_text()
    for field in dataclasses.fields(ManagerConfig):
        at = next(n for n, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[at + 1].startswith('    """'), f"{field.name} has no reason"
        assert f"`{field.name}`" in text


async def test_background_tasks_broadcast_to_a_connection_manager_and_only_while_somebody_listens() -> None:
    manager, fetched = ConnectionManager(), []

    async def fetch() -> dict:
        fetched.append(True)
        return {"n": len(fetched)}

    app = FastAPI()

    @app.websocket("/ws")
    async def clients(websocket: WebSocket) -> None:
        await manager.serve(websocket)

    tasks = BackgroundTasks(manager)
    tasks.add(sources.conditional(fetch, every=0.01, minimum=0.01, event_type="status"))
    with Server(app) as server:
        async with tasks:
            await asyncio.sleep(0.05)
            assert fetched == []
            async with connect(server.url("/ws")) as client:
                message = json.loads(await client.recv())
                assert message["type"] == "status"


@pytest.mark.parametrize("part", [EventBus, ConnectionManager])
def test_the_parts_need_no_loop_to_be_made(part) -> None:
    part()


async def test_the_example_of_the_aggregator_goes_through_its_phases(capsys) -> None:
    example = load(ROOT / "examples/advanced_aggregator.py")
    await example.main(phase=0.4)
    phases = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(phases) == ["quiet", "spike", "outage", "healed"]
    assert float(phases["spike"].split()[1]) < float(phases["quiet"].split()[1])
    assert ["tripped" in phase for phase in phases.values()] == [False, False, True, False]
    assert example.received[0]["type"] == "aggregate.novelty"
