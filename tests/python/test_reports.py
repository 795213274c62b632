"""The health bus: every kind of report, coalesced, from a bus that may be sync, async, failing or stuck."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import ConnectTimeout, SafeBroadcaster
from support import NOWHERE, HealthBus, PlainServer, event, eventually, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., SafeBroadcaster]


class SyncBus(HealthBus):
    def inject(self, report: dict[str, Any]) -> None:  # type: ignore[override]
        self.reports.append(report)


async def test_a_plain_inject_is_called(make: Make, server: PlainServer) -> None:
    bus = SyncBus()
    await make(server.url, None, bus).start(5)
    await eventually(lambda: bus.contents("broadcaster_ready"))


async def test_an_async_inject_is_awaited(make: Make, server: PlainServer, bus: HealthBus) -> None:
    await make(server.url, None, bus).start(5)
    await eventually(lambda: bus.contents("broadcaster_ready"))


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_failing_bus_is_logged_and_never_reaches_the_caller(
    make: Make, server: PlainServer, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    class Sync:
        def inject(self, _: dict[str, Any]) -> None:
            raise ZeroDivisionError("the bus is off")

    class Async:
        async def inject(self, _: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            raise ZeroDivisionError("the bus is off")

    broadcaster = make(server.url, None, Sync() if kind == "sync" else Async())
    await broadcaster.start(5)
    assert await broadcaster.safe_emit(event(1), durability="delivered") is True
    await eventually(lambda: "the bus is off" in caplog.text)
    assert "the health bus failed" in caplog.text


async def test_a_bus_without_inject_is_logged(
    make: Make, server: PlainServer, caplog: pytest.LogCaptureFixture
) -> None:
    broadcaster = make(server.url, None, object())
    await broadcaster.start(5)
    assert await broadcaster.safe_emit(event(1)) is True
    await eventually(lambda: "the health bus failed" in caplog.text)


async def test_a_bus_that_never_returns_does_not_fill_memory(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safe_broadcaster.emitter._MAX_REPORTS", 5)

    class Stuck:
        calls = 0

        async def inject(self, _: dict[str, Any]) -> None:
            self.calls += 1
            await asyncio.sleep(60)

    bus = Stuck()
    broadcaster = make(NOWHERE, None, bus, backoff_initial=0.001, backoff_max=0.001)
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.2)
    await eventually(lambda: "this one is dropped" in caplog.text)
    assert bus.calls == 5
    started = time.monotonic()
    await broadcaster.stop(0.1)
    assert time.monotonic() - started < 3, "stop waits for reports no longer than for events"
    for task in broadcaster._reports:
        task.cancel()


async def test_reports_of_the_stop_itself_reach_the_bus(make: Make, server: PlainServer) -> None:
    class Slow(HealthBus):
        async def inject(self, report: dict[str, Any]) -> None:
            await asyncio.sleep(0.02)
            self.reports.append(report)

    bus = Slow()
    broadcaster = make(server.url, None, bus)
    await broadcaster.start(5)
    await broadcaster.stop()
    assert bus.contents("broadcaster_ready")


async def test_without_start_nobody_is_told_and_nothing_breaks(make: Make, bus: HealthBus) -> None:
    broadcaster = make(NOWHERE, None, bus)
    for n in range(10):
        await broadcaster.safe_emit(event(n))
    await eventually(lambda: broadcaster.get_stats()["epoch"])
    await broadcaster.stop(0)
    assert bus.reports == []


async def test_reports_are_logged_with_their_weight(
    make: Make, server: PlainServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="safe_broadcaster"):
        await make(server.url).start(5)
        with pytest.raises(ConnectTimeout):
            await make(NOWHERE).start(0.05)
        await eventually(lambda: "broadcaster_connection_failed" in caplog.text)
    levels = {record.message.split(":")[0]: record.levelname for record in caplog.records}
    assert levels["broadcaster_ready"] == "INFO"
    assert levels["broadcaster_connection_failed"] == "WARNING"


async def test_ready_tells_whether_it_is_the_first_time(make: Make, server: PlainServer, bus: HealthBus) -> None:
    await make(server.url, None, bus).start(5)
    server.cut()
    await eventually(lambda: len(bus.contents("broadcaster_ready")) == 2)
    first, second = (each["metrics"] for each in bus.contents("broadcaster_ready"))
    assert (first["first"], first["reconnects"]) == (True, 0)
    assert (second["first"], second["reconnects"]) == (False, 1)


async def test_an_outage_is_reported_at_once_and_then_once_per_interval(make: Make, bus: HealthBus) -> None:
    broadcaster = make(NOWHERE, None, bus, report_interval=0.3, backoff_initial=10, backoff_max=10)
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.02)
    started = time.monotonic()
    total = 0
    await broadcaster.safe_emit(event(0))
    await eventually(lambda: bus.contents("broadcaster_spill"))
    assert time.monotonic() - started < 0.2, "at once"
    while time.monotonic() - started < 1.0:
        await broadcaster.safe_emit(event(0))
        total += 1
        await asyncio.sleep(0.002)
    await eventually(lambda: sum(r["metrics"]["spilled"] for r in bus.contents("broadcaster_spill")) == total + 1)
    reports = bus.contents("broadcaster_spill")
    assert 3 <= len(reports) <= 6, "not one per event"
    assert reports[0]["metrics"]["spilled"] == reports[0]["top_rejects"][0][1] == 1
    assert reports[0]["top_rejects"][0][0] == "ws_not_ready"


async def test_a_second_outage_is_reported_at_once_again(make: Make, bus: HealthBus) -> None:
    server = PlainServer()
    async with server:
        broadcaster = make(server.url, None, bus, report_interval=30)
        await broadcaster.start(5)
    for outage in (1, 2):
        await eventually(lambda: not broadcaster.connected)
        await broadcaster.safe_emit(event(outage))
        await eventually(lambda outage=outage: len(bus.contents("broadcaster_spill")) == outage)
        async with server:
            await broadcaster.wait_connected(5)
            assert await broadcaster.drain(5)


async def test_events_lost_with_the_link_are_reported_as_send_failed(make: Make, bus: HealthBus) -> None:
    async with PlainServer(pongs=False) as server:
        broadcaster = make(server.url, None, bus)
        await broadcaster.start(5)
        await broadcaster.safe_emit(event(1))
        await eventually(lambda: server.events)
        server.cut()
        await eventually(lambda: bus.contents("broadcaster_spill"))
        assert bus.contents("broadcaster_spill")[0]["top_rejects"] == [["send_failed", 1]]
        server.pongs = True
        await broadcaster.stop(0)


def slo(bus: HealthBus, kind: str, name: str) -> list[dict[str, Any]]:
    """The metrics of the reports of this kind about this objective."""
    return [each["metrics"] for each in bus.contents(f"broadcaster_slo_{kind}") if each["metrics"]["slo"] == name]


async def test_a_deep_spill_and_its_end_are_reported_once_each(make: Make, bus: HealthBus) -> None:
    server = PlainServer()
    async with server:
        pass
    broadcaster = make(server.url, None, bus, slo_spill_depth=5, slo_spill_depth_alert=20)
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.02)
    for n in range(50):
        await broadcaster.safe_emit(event(n))
    await eventually(lambda: slo(bus, "breach", "spill_depth"))
    for n in range(50, 60):
        await broadcaster.safe_emit(event(n))
    async with server:
        assert await broadcaster.drain(5)
        await eventually(lambda: slo(bus, "recovered", "spill_depth"))
        breaches, recoveries = slo(bus, "breach", "spill_depth"), slo(bus, "recovered", "spill_depth")
        assert (len(breaches), len(recoveries)) == (1, 1)
        assert breaches[0]["value"] > breaches[0]["threshold"] == 20
        assert recoveries[0]["value"] <= recoveries[0]["threshold"] == 5
        await broadcaster.stop()


async def test_a_low_success_rate_and_its_end_are_reported_once_each(make: Make, bus: HealthBus) -> None:
    server = PlainServer()
    async with server:
        pass
    broadcaster = make(server.url, None, bus, slo_emit_success_rate=0.5)
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.02)
    for n in range(10):
        await broadcaster.safe_emit(event(n))
    await eventually(lambda: slo(bus, "breach", "emit_success_rate"))
    assert broadcaster.get_stats()["emit_success_rate_1m"] < 0.5
    async with server:
        await broadcaster.wait_connected(5)
        for n in range(10, 40):
            await broadcaster.safe_emit(event(n))
        await eventually(lambda: slo(bus, "recovered", "emit_success_rate"))
        assert len(slo(bus, "breach", "emit_success_rate")) == len(slo(bus, "recovered", "emit_success_rate")) == 1
        assert 0.5 <= broadcaster.get_stats()["emit_success_rate_1m"] < 1
        await broadcaster.stop()


async def test_a_slow_flush_is_reported_while_it_lasts_and_a_quick_one_recovers(make: Make, bus: HealthBus) -> None:
    server = PlainServer(pongs=False)
    async with server:
        broadcaster = make(server.url, None, bus, slo_flush_latency=0.1, ack_timeout=30)
        await broadcaster.safe_emit(event(1))
        await broadcaster.start(5)
        await eventually(lambda: slo(bus, "breach", "flush_latency"))
        server.pongs = True
        server.cut()
        assert await broadcaster.drain(5)
        await eventually(lambda: slo(bus, "recovered", "flush_latency"))
        assert len(slo(bus, "breach", "flush_latency")) == len(slo(bus, "recovered", "flush_latency")) == 1
        assert broadcaster.get_stats()["flush_latency_last"] < 5
        await broadcaster.stop()


async def test_a_long_flush_tells_how_far_it_is(make: Make, bus: HealthBus) -> None:
    async with PlainServer(pongs=False) as server:
        broadcaster = make(server.url, None, bus, ack_timeout=30)
        for n in range(20):
            await broadcaster.safe_emit(event(n))
        await broadcaster.start(5)
        await eventually(lambda: len(bus.contents("broadcaster_flush_progress")) >= 2)
        for each in bus.contents("broadcaster_flush_progress"):
            told = each["metrics"]
            assert (told["flushed"], told["remaining"], told["rate"]) == (0, 20, 0)
            assert told["seconds"] >= 0.05, "it is told of once it has lasted for report_interval"
        stats = broadcaster.get_stats()
        assert (stats["flush_remaining"], stats["flush_rate_current"]) == (20, 0)
        assert stats["flush_window_bytes"] >= 64 << 10
        server.pongs = True
        server.cut()
        assert await broadcaster.drain(5)
        stats = broadcaster.get_stats()
        assert (stats["flush_remaining"], stats["flush_rate_current"]) == (0, 0)
        await eventually(lambda: bus.contents("broadcaster_flush_complete"))
        await broadcaster.stop()


async def test_a_disk_that_refuses_is_reported_and_its_recovery_too(
    make: Make, bus: HealthBus, server: PlainServer
) -> None:
    """A bound far below what SQLite needs stands for a full disk."""
    resource = pytest.importorskip("resource", reason="resource limits are POSIX only")
    broadcaster = make(NOWHERE, None, bus)
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.05)
    await broadcaster.safe_emit(event(0))
    await eventually(lambda: broadcaster.get_stats()["spill_bytes"] > 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        for n in range(1, 100):
            assert await broadcaster.safe_emit(event(n)) is False, "accepted all the same"
        await eventually(lambda: bus.contents("broadcaster_degraded"))
        assert broadcaster.get_stats()["degraded"] is True
        assert numbers(list(broadcaster.spill)) == list(range(100)), "kept in memory"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    await eventually(lambda: broadcaster.get_stats()["degraded"] is False)
    worse, better = bus.contents("broadcaster_degraded")
    assert (worse["success"], worse["metrics"]["degraded"]) == (False, True)
    assert worse["metrics"]["error"]
    assert (better["success"], better["metrics"]["degraded"]) == (True, False)
    assert numbers(list(broadcaster.spill)) == list(range(100))


async def test_a_damaged_spill_is_salvaged_and_told(
    make: Make, spill_path: Path, bus: HealthBus, caplog: pytest.LogCaptureFixture
) -> None:
    broadcaster = make(NOWHERE, spill_path)
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.05)
    for n in range(50):
        await broadcaster.safe_emit(event(n))
    await broadcaster.stop(0)
    content = bytearray(spill_path.read_bytes())
    content[:100] = bytes(100)
    spill_path.write_bytes(content)
    broadcaster = make(NOWHERE, spill_path, bus)
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.05)
    assert numbers(list(broadcaster.spill)) == list(range(50))
    await eventually(lambda: bus.contents("broadcaster_spill_damaged"))
    (report,) = bus.contents("broadcaster_spill_damaged")
    assert report["success"] is False
    metrics = report["metrics"]
    assert (metrics["salvaged"], metrics["unreadable"]) == (50, 0)
    assert Path(metrics["set_aside"]).read_bytes() == content
    assert f"the damaged file is {metrics['set_aside']}" in caplog.text
