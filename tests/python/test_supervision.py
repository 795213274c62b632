"""A hub whose port is lost takes it again, or says that it cannot; a disk that refuses is told in the same way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from asgi import Server, frame, subscribe, subscriber
from safe_broadcaster import ConfigError, EventBroadcaster, WebSocketCircuitState
from support import eventually

QUICK = {"supervision_interval": 0.02, "max_recovery_attempts": 2, "breaker_cooldown": 0.02}


def listening_descriptor(port: int) -> int:
    """The descriptor of this process that listens on the port."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and sock.getsockname()[1] == port:
                return int(entry.name)
    raise AssertionError("nobody listens there")


def steal(port: int) -> socket.socket:
    """Close the hub's listening descriptor behind its back, and take the port."""
    thief = socket.socket()
    thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    os.close(listening_descriptor(port))
    thief.bind(("127.0.0.1", port))
    thief.listen()
    return thief


async def test_a_lost_port_is_taken_again_and_sessions_stay() -> None:
    async with EventBroadcaster(port=0, **QUICK) as hub, subscriber(hub.url, "*") as (ws, _):
        os.close(listening_descriptor(hub.port))
        await eventually(lambda: not hub.is_listener_healthy())
        await eventually(hub.is_listener_healthy)
        assert (hub.is_degraded(), hub.get_circuit_state()) == (False, WebSocketCircuitState.CLOSED)
        async with connect(hub.url) as newcomer:
            await subscribe(newcomer, "*")
            assert await hub.broadcast("a", 1) == 2
            assert (await frame(newcomer))["seq"] == (await frame(ws))["seq"] == 1, "nothing else was said"


async def test_a_port_that_cannot_be_had_degrades_the_hub_and_everyone_is_told_until_it_is_over(caplog) -> None:
    caplog.set_level(logging.WARNING, "safe_broadcaster")
    hub = EventBroadcaster(port=0, **QUICK)
    with Server(hub.asgi()) as server:  # starts the hub in its own loop
        async with subscriber(hub.url, "a") as (ws, _), connect(server.url("/ws")) as late:
            await hub.broadcast("a", 1)
            assert (await frame(ws))["seq"] == 1
            thief = steal(hub.port)
            await eventually(hub.is_degraded)
            assert not hub.is_listener_healthy()
            assert any(record.levelno == logging.CRITICAL and "DEGRADED" in record.message for record in caplog.records)
            notice = await frame(ws)
            assert notice["type"] == "service_status"
            data = notice["data"]
            assert (data["service"], data["status"], data["since"]) == ("event_broadcaster", "degraded", 1)
            assert data["circuit_state"] in {"open", "half_open"}
            assert "New connections" in data["message"]

            assert (await subscribe(late, "a"))["action"] == "subscribed"
            assert (await frame(late))["data"]["status"] == "degraded", "who comes now is told too"
            assert await hub.broadcast("a", 2) == 2, "events go on"

            thief.close()
            await eventually(lambda: not hub.is_degraded())
            for client in (ws, late):
                while (notice := await frame(client))["type"] != "service_status" or (
                    notice["data"]["status"] == "degraded"
                ):
                    pass
                assert notice["data"]["status"] == "healthy"
                assert notice["data"]["circuit_state"] == "closed"
            async with subscriber(hub.url, "a"):
                assert hub.is_listener_healthy()


async def test_a_disk_that_refuses_is_told_on_the_wire_and_so_is_its_recovery(tmp_path, caplog) -> None:
    """The directory is made to look full by a limit of this process on the size of files."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        async with (
            EventBroadcaster(port=0, log_path=tmp_path / "log.db", supervision_interval=0.02) as hub,
            subscriber(hub.url, "a") as (ws, _),
        ):
            await hub.broadcast("a", 1)
            assert (await frame(ws))["seq"] == 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
            with pytest.raises(OSError):
                await hub.broadcast("a", "x" * 1_000_000)
            assert hub.is_degraded()
            await eventually(lambda: "the hub's log fails" in caplog.text)
            notice = (await frame(ws))["data"]
            assert (notice["status"], notice["since"]) == ("degraded", 1)
            assert "stored" in notice["message"]
            async with connect(hub.url) as late:
                await subscribe(late, "a")
                assert (await frame(late))["data"] == notice
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            await hub.broadcast("a", 2)
            frames = [await frame(ws), await frame(ws)]
            assert sorted(each["type"] for each in frames) == ["event", "service_status"]
            assert json.dumps(frames).count('"healthy"') == 1
            assert not hub.is_degraded()
            await eventually(lambda: "the hub's log works again" in caplog.text)
            assert caplog.text.count("the hub's log fails") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("wrong", [{"supervision_interval": 0}, {"max_recovery_attempts": 0}, {"breaker_cooldown": -1}])
async def test_a_wrong_setting_is_named_and_the_port_left_free(wrong) -> None:
    hub = EventBroadcaster(port=0, **wrong)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        await hub.start()
    assert not hub.is_listener_healthy()


async def test_supervision_outlives_its_own_errors(caplog) -> None:
    async with EventBroadcaster(port=0, **QUICK) as hub:
        core, asked = hub._supervisor._core, []

        class Broken:
            def stats(self) -> bytes:
                asked.append(1)
                raise RuntimeError("broken")

        hub._supervisor._core = Broken()
        await eventually(lambda: len(asked) >= 2)
        assert "looking after the hub failed" in caplog.text
        hub._supervisor._core = core
        os.close(listening_descriptor(hub.port))
        await eventually(lambda: not hub.is_listener_healthy())
        await eventually(hub.is_listener_healthy)


async def test_supervision_ends_with_the_hub() -> None:
    before = asyncio.all_tasks()
    async with EventBroadcaster(port=0):
        assert len(asyncio.all_tasks()) == len(before) + 1
    assert asyncio.all_tasks() == before
