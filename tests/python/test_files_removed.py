"""Somebody deletes the files of a running broadcaster: they are put back, and then a kill loses nothing."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from safe_broadcaster import SpillLocked
from scripts import run
from support import NOWHERE, HealthBus, PlainServer, event, eventually, numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from safe_broadcaster import SafeBroadcaster

    Make = Callable[..., SafeBroadcaster]

SUFFIXES = ["", "-wal", "-shm", ".lock", ".ring", ".reserve"]


@pytest.mark.parametrize("gone", [[""], [".ring"], ["-wal", "-shm"], SUFFIXES], ids=str)
async def test_files_removed_under_a_running_broadcaster_are_put_back_and_a_kill_loses_nothing(
    spill_path: Path, server: PlainServer, make: Make, gone: list[str]
) -> None:
    code, lines, err = run(
        """
        b = SafeBroadcaster(NOWHERE, path, **QUICK)
        for n in range(3000):
            b.emit_nowait(event(n))
        len(list(b.spill))  # it is open
        b.emit_nowait(event(3000))
        for suffix in sys.argv[2].split(","):
            os.unlink(path + suffix)
        eventually_blocking(lambda: "was removed" in (b.get_stats()["last_error"] or ""))
        eventually_blocking(lambda: not b.get_stats()["degraded"])
        b.emit_nowait(event(3001))
        say("back")
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        spill_path,
        ",".join(gone),
    )
    assert (code, lines) == (-signal.SIGKILL, ["back"]), err
    async with make(server.url, spill_path):
        await eventually(lambda: len(server.events) >= 3002)
    assert numbers(server.events) == list(range(3002))


async def test_while_the_link_is_up_what_lay_in_a_removed_ring_goes_into_the_spill(
    spill_path: Path, make: Make, bus: HealthBus, server: PlainServer
) -> None:
    silent = PlainServer(pongs=False)
    async with silent, make(silent.url, spill_path, bus, ack_timeout=60.0) as broadcaster:
        for n in range(500):
            await broadcaster.safe_emit(event(n))
        assert broadcaster.get_stats()["spill_bytes"] == 0
        spill_path.with_name(spill_path.name + ".ring").unlink()
        await eventually(lambda: len(bus.contents("broadcaster_degraded")) == 2)
        worse, better = bus.contents("broadcaster_degraded")
        assert (worse["success"], better["success"]) == (False, True)
        assert "was removed" in worse["metrics"]["error"]
        assert ".ring" in worse["metrics"]["error"]
        assert broadcaster.get_stats()["spill_bytes"] > 0
        assert broadcaster.connected
        assert await broadcaster.safe_emit(event(500), durability="power") is True
        await broadcaster.stop(drain_timeout=0)
    async with make(server.url, spill_path):
        await eventually(lambda: len(server.events) >= 501)
    assert numbers(server.events) == list(range(501))


async def test_a_path_that_another_took_is_left_to_it_and_the_end_says_what_is_lost(
    spill_path: Path, make: Make
) -> None:
    first = make(NOWHERE, spill_path)
    first.emit_nowait(event(1))
    assert numbers(list(first.spill)) == [1]
    for suffix in SUFFIXES:
        spill_path.with_name(spill_path.name + suffix).unlink()
    second = make(NOWHERE, spill_path)
    second.emit_nowait(event(2))
    assert numbers(list(second.spill)) == [2]
    await eventually(lambda: "is owned by process" in (first.get_stats()["last_error"] or ""))
    assert first.get_stats()["degraded"]
    assert not second.get_stats()["degraded"]
    with pytest.raises(SpillLocked):
        await first.stop(0)
    assert numbers(list(second.spill)) == [2]
