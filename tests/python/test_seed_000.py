"""Boot order, heartbeats and acceptance criteria of the SafeBroadcaster pattern; its broadcaster is in test_seed.py."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from datetime import datetime, timezone
from pathlib import Path

import pytest

from safe_broadcaster import EventBroadcaster, Heartbeat, SafeBroadcaster
from support import HealthBus, eventually
from virtual import now, virtual

ROOT = Path(__file__).parents[2]
logger = logging.getLogger(__name__)


class WebSocketServer(EventBroadcaster):
    """The pattern's port may be taken on this machine: any free one instead."""

    def __init__(self, port: int) -> None:
        assert port == 8000
        super().__init__(port=0)


class ConsciousnessEngine:
    """An engine as the pattern has it: it gets a broadcaster, and beats by itself."""

    def __init__(self, citizen_id: str, broadcaster: SafeBroadcaster) -> None:
        self.citizen_id = citizen_id
        self.broadcaster = broadcaster
        self.working_memory = [1, 2, 3]
        self.last_tick_time = datetime.now(timezone.utc)
        self.started_ready = False

    def get_active_node_count(self) -> int:
        return 5

    def get_total_energy(self) -> float:
        return 0.5

    async def start(self) -> None:
        self.started_ready = self.broadcaster.ready.is_set()
        self.task = asyncio.create_task(self._heartbeat_loop())

    async def _heartbeat_loop(self) -> None:
        while True:
            await asyncio.sleep(0.01)

            await self.broadcaster.safe_emit({
                "type": "graph.delta.heartbeat",
                "topic": f"graph/{self.citizen_id}/delta/heartbeat",
                "content": {
                    "citizen_id": self.citizen_id,
                    "wm_size": len(self.working_memory),
                    "active_nodes": self.get_active_node_count(),
                    "energy_total": self.get_total_energy(),
                    "last_tick": self.last_tick_time.isoformat()
                },
                "timestamp": datetime.now(timezone.utc).isoformat()
            })  # fmt: skip


async def test_the_boot_function_runs_as_it_was_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    health_bus, done = HealthBus(), []

    async def ingest_l4_protocol() -> None:
        done.append("schemas")

    async def start_health_tools(broadcaster: SafeBroadcaster) -> None:
        done.append(broadcaster.get_stats()["ready"])

    async def boot_system():
        logger.info("Step 1: Ingesting L4 protocol schemas...")
        await ingest_l4_protocol()

        logger.info("Step 2: Starting WebSocket server...")
        ws_server = WebSocketServer(port=8000)
        await ws_server.start()
        await ws_server.publish_ready()

        logger.info("Step 3: Connecting SafeBroadcaster...")
        broadcaster = SafeBroadcaster(
            ws_client=ws_server.client,
            spill_path=".broadcaster_spill.db",
            health_bus=health_bus
        )  # fmt: skip
        await broadcaster.start()
        await broadcaster.ready.wait()

        logger.info("Step 4: Starting consciousness engines...")
        engines = [
            ConsciousnessEngine(citizen_id="ada-architect", broadcaster=broadcaster),
            ConsciousnessEngine(citizen_id="atlas-infrastructure", broadcaster=broadcaster),
        ]
        for engine in engines:
            await engine.start()

        logger.info("Step 5: Starting health monitoring...")
        await start_health_tools(broadcaster=broadcaster)
        return ws_server, broadcaster, engines

    ws_server, broadcaster, engines = await boot_system()
    assert done == ["schemas", True]
    assert all(engine.started_ready for engine in engines)
    await eventually(lambda: ws_server.get_stats()["events"] >= 5)
    first, *others = [message["data"] for message in ws_server.get_messages_since(0)]
    assert first["type"] == "bus.ready"
    assert {event["topic"] for event in others} == {
        "graph/ada-architect/delta/heartbeat",
        "graph/atlas-infrastructure/delta/heartbeat",
    }
    await eventually(lambda: health_bus.contents("broadcaster_ready"))
    for engine in engines:
        engine.task.cancel()
    await asyncio.wait([engine.task for engine in engines])
    await broadcaster.stop()
    await ws_server.stop()


def example():
    spec = importlib.util.spec_from_file_location("boot_example", ROOT / "examples/boot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_a_cold_start_takes_less_than_ten_seconds_and_loses_no_event(capsys) -> None:
    began = now()
    emitted = await example().main(seconds=0.5)
    assert now() - began < 10
    out = capsys.readouterr().out
    assert "up after" in out
    assert emitted >= 4
    assert f"{emitted} nodes emitted, {emitted} in the hub's log" in out
    assert "broadcaster_ready" in out
    for number, step in enumerate(["schemas", "hub", "broadcaster", "engines", "health tools"], 1):
        assert f"[{number}/5] {step}: ready after" in out


async def test_a_step_that_fails_leaves_nothing_running(capsys) -> None:
    before = asyncio.all_tasks()
    with pytest.raises(SystemExit):
        await example().main(broken="engines")
    assert asyncio.all_tasks() == before
    out = capsys.readouterr().out
    assert "step 'engines' failed" in out
    assert "RuntimeError: no graph to walk. Undone, in this order: engines, broadcaster, hub" in out


async def test_engines_that_emit_before_the_hub_is_up_lose_nothing(make, tmp_path) -> None:
    hub = EventBroadcaster(port=0)
    broadcaster = make(hub.client)
    for n in range(100):
        assert await broadcaster.safe_emit({"type": "a", "n": n}) is False
    starting = asyncio.create_task(broadcaster.start())
    await asyncio.sleep(0)
    async with hub:
        await starting
        await eventually(lambda: hub.get_stats()["events"] == 100)
        assert [message["data"]["n"] for message in hub.get_messages_since(0)] == list(range(100))
        await broadcaster.stop()


@virtual
async def test_five_minutes_without_a_node_still_show_a_heartbeat_of_at_most_thirty_seconds_ago() -> None:
    ages, beats = [], []

    class Broadcaster:
        def safe_emit(self, _: object):
            beats.append(now())
            return asyncio.sleep(0)

    async with Heartbeat(Broadcaster(), "ada"):
        for _ in range(300):
            await asyncio.sleep(1)
            ages.append(now() - beats[-1])
    assert max(ages) <= 30
