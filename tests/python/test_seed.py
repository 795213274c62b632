"""The calling code of the pattern that users run today works unchanged: its names, its counters, its reports."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from safe_broadcaster import SafeBroadcaster
from support import AsyncClient, HealthBus, PlainServer, SyncClient, event, eventually, numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., SafeBroadcaster]


async def test_the_seeds_life_of_a_broadcaster(make: Make, spill_path: Path, bus: HealthBus) -> None:
    client = AsyncClient()
    client.up = False
    broadcaster = make(ws_client=client, spill_path=str(spill_path), health_bus=bus)
    assert broadcaster.ready.is_set() is False
    assert broadcaster.get_stats() | {} == broadcaster.get_stats()

    await broadcaster.start()
    await broadcaster.ready.wait()
    assert client.connects == 1
    assert await broadcaster.safe_emit(event(0)) is True
    await eventually(lambda: client.sent)

    client.up = False
    client.fail_connect = ConnectionError("down")
    for n in range(1, 6):
        assert await broadcaster.safe_emit(event(n)) is False
    assert broadcaster.get_stats()["ws_available"] is False
    assert broadcaster.get_stats()["ready"] is True, "latched"
    assert (broadcaster.emit_count, broadcaster.spill_count) == (1, 5)
    assert (len(broadcaster.spill), broadcaster.get_stats()["current_spill_depth"]) == (5, 5)
    assert numbers(list(broadcaster.spill)) == [1, 2, 3, 4, 5]

    client.up = True
    client.fail_connect = None
    await broadcaster.flush_spill()
    await eventually(lambda: numbers(client.sent) == [0, 1, 2, 3, 4, 5])
    await eventually(lambda: broadcaster.flush_count == 5)
    assert len(broadcaster.spill) == 0
    await eventually(lambda: bus.contents("broadcaster_flush_complete"))
    kinds = bus.kinds()
    assert kinds["broadcaster_ready"] >= 1
    assert kinds["broadcaster_spill"] >= 1
    flush = bus.contents("broadcaster_flush_complete")[-1]["metrics"]
    assert (flush["failed"], flush["remaining"]) == (0, 0)


async def test_the_reports_have_the_seeds_shape(make: Make, spill_path: Path, bus: HealthBus) -> None:
    client = AsyncClient()
    client.up = False
    client.fail_connect = ConnectionError("not yet")
    broadcaster = make(ws_client=client, spill_path=str(spill_path), health_bus=bus)
    starting = asyncio.create_task(broadcaster.start())
    await eventually(lambda: client.connects)
    client.fail_connect = None
    await starting
    client.fail_connect = ConnectionError("again")
    client.up = False
    await broadcaster.safe_emit(event(1))
    wanted = ("broadcaster_connection_failed", "broadcaster_ready", "broadcaster_spill")
    await eventually(lambda: all(bus.contents(kind) for kind in wanted))
    for report in bus.reports:
        assert report.keys() == {"type", "content", "timestamp"}
        assert report["type"] == "health.compliance.snapshot"
        content = report["content"]
        assert content.keys() == {
            "emitter", "event_type", "success", "accept_rate", "reject_rate", "top_rejects", "metrics",
        }  # fmt: skip
        assert content["emitter"] == "broadcaster"
        good = content["success"]
        assert (content["accept_rate"], content["reject_rate"]) == ((1.0, 0.0) if good else (0.0, 1.0))
        assert content["top_rejects"] == [] if good else len(content["top_rejects"][0]) == 2
        totals = {"total_emits", "total_spills", "total_flushes", "current_spill_depth"}
        assert totals <= content["metrics"].keys()
        at = datetime.fromisoformat(report["timestamp"])
        assert abs((datetime.now(timezone.utc) - at).total_seconds()) < 60
    spill = bus.contents("broadcaster_spill")[0]["metrics"]
    assert spill["topic"] == "graph/ada/delta/node"
    assert {"error", "spill_depth"} <= spill.keys()


async def test_a_health_bus_is_not_needed(make: Make, server: PlainServer, spill_path: Path) -> None:
    broadcaster = SafeBroadcaster(server.url, str(spill_path), None)
    await broadcaster.start()
    assert await broadcaster.safe_emit(event(1)) is True
    await broadcaster.stop()


async def test_engines_wait_at_the_gate_until_the_server_is_there(make: Make) -> None:
    """Acceptance criterion 1: a cold start loses nothing, and engines tick only after ``ready``."""
    server = PlainServer()
    async with server:
        pass
    broadcaster = make(server.url)
    ticks: list[int] = []

    async def engine(n: int) -> None:
        await broadcaster.ready.wait()
        ticks.append(n)
        await broadcaster.safe_emit(event(n))

    engines = [asyncio.create_task(engine(n)) for n in range(3)]
    starting = asyncio.create_task(broadcaster.start())
    await broadcaster.safe_emit(event(-1))
    await eventually(lambda: broadcaster.get_stats()["last_error"])
    assert ticks == []
    async with server:
        await starting
        await asyncio.gather(*engines)
        assert await broadcaster.drain(5)
        assert numbers(server.events)[0] == -1
        assert sorted(numbers(server.events)) == [-1, 0, 1, 2]
        await broadcaster.stop()


async def test_a_server_killed_and_restarted_gets_everything(make: Make, bus: HealthBus) -> None:
    """Acceptance criteria 2 and 3: spill, automatic flush, and both visible in the reports."""
    server = PlainServer()
    async with server:
        broadcaster = make(server.url, None, bus)
        await broadcaster.start()
        assert await broadcaster.safe_emit(event(0), durability="delivered")
    await eventually(lambda: not broadcaster.connected)
    for n in range(1, 20):
        assert await broadcaster.safe_emit(event(n)) is False
    await eventually(lambda: bus.contents("broadcaster_connection_failed"))
    assert bus.contents("broadcaster_connection_failed")[0]["top_rejects"][0][0] == "ws_not_ready"
    async with server:
        await eventually(lambda: bus.contents("broadcaster_flush_complete"))
        assert numbers(server.events) == list(range(20))
        flush = bus.contents("broadcaster_flush_complete")[0]["metrics"]
        assert (flush["flushed"], flush["failed"], flush["remaining"]) == (19, 0, 0)
        assert bus.contents("broadcaster_spill")[0]["metrics"]["spill_depth"] >= 1
        await broadcaster.stop()


async def test_the_attributes_of_the_seed_are_there(make: Make, bus: HealthBus, spill_path: Path) -> None:
    client = SyncClient()
    broadcaster = make(client, spill_path, bus)
    assert (broadcaster.ws, broadcaster.health_bus) == (client, bus)
    assert broadcaster.spill_path == str(spill_path)
