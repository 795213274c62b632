"""An event that the peer refuses for ever holds up nothing: it is parked, told, and can be sent again."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from safe_broadcaster import EventBroadcaster, EventRefused, SafeBroadcaster
from support import HealthBus, PlainServer, event, eventually, frame, numbers, read_frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    Make = Callable[..., SafeBroadcaster]

NO_EVENT: dict[str, Any] = {"type": 7}
"""JSON, and no event to a hub: its type is not a text."""


@pytest.fixture
async def hub() -> AsyncIterator[EventBroadcaster]:
    async with EventBroadcaster(port=0) as running:
        yield running


class Picky(PlainServer):
    """Closes with a code over an event that carries ``bad``."""

    def __init__(self, code: int = 1009) -> None:
        super().__init__()
        self.code = code
        self.picky = True

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.shake_hands(reader, writer)
        while True:
            opcode, payload = await read_frame(reader)
            if opcode == 0x1:
                received = orjson.loads(payload)
                if self.picky and "bad" in received:
                    writer.write(frame(0x8, struct.pack("!H", self.code)))
                    await writer.drain()
                    writer.write_eof()
                    while await reader.read(1 << 16):
                        pass  # a reset would take the close frame with it
                    return
                self.events.append(received)
            elif opcode == 0x9:
                writer.write(frame(0xA, payload))


async def spill_command(*arguments: str) -> tuple[int, str, str]:
    """Run ``safe-broadcaster spill`` in a process of its own."""
    command = [sys.executable, "-m", "safe_broadcaster", "spill", *arguments]
    ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=50, check=False)
    return ended.returncode, ended.stdout, ended.stderr


async def test_what_the_hub_refuses_is_parked_and_the_rest_goes_on(
    make: Make, hub: EventBroadcaster, bus: HealthBus
) -> None:
    broadcaster = make(hub.url, None, bus)
    await broadcaster.start(5)
    for n in range(100):
        broadcaster.emit_nowait(NO_EVENT if n == 50 else event(n))
    assert await broadcaster.drain(20)
    stats = broadcaster.get_stats()
    assert (stats["parked"], stats["acked_seq"], stats["current_spill_depth"], stats["reconnects"]) == (1, 100, 0, 0)
    await eventually(lambda: bus.contents("broadcaster_event_parked"))
    (report,) = bus.contents("broadcaster_event_parked")
    assert report["metrics"]["seq"] == 51
    assert "expected a string" in report["metrics"]["reason"]
    assert report["top_rejects"] == [["refused", 1]]
    told = hub.get_stats()
    assert (told["events"], told["gaps"], told["refused"]) == (99, 1, 3)


async def test_who_waits_for_the_delivery_of_a_refused_event_is_told(make: Make, hub: EventBroadcaster) -> None:
    broadcaster = make(hub.url, durability="delivered")
    await broadcaster.start(5)
    refused, taken = broadcaster.safe_emit(NO_EVENT), broadcaster.safe_emit(event(1))
    with pytest.raises(EventRefused, match=r"refused the event \(seq 1\): .*it is parked in the spill"):
        await refused
    assert await taken is True
    late = broadcaster.safe_emit(NO_EVENT)
    assert await broadcaster.drain(10)
    with pytest.raises(EventRefused):  # asked only when all is over
        await late
    with pytest.raises(EventRefused):
        await asyncio.to_thread(broadcaster.emit_nowait, NO_EVENT)


async def test_parked_events_survive_a_restart_and_their_place_is_not_sent_again(
    make: Make, hub: EventBroadcaster, spill_path: Path
) -> None:
    broadcaster = make(hub.url, spill_path)
    await broadcaster.safe_emit(event(1))
    await broadcaster.safe_emit(NO_EVENT)
    await broadcaster.start(5)
    assert await broadcaster.drain(10)
    await broadcaster.stop()
    again = make(hub.url, spill_path)
    await again.start(5)
    assert await again.safe_emit(event(2), durability="delivered") is True
    assert (again.get_stats()["parked"], hub.get_stats()["refused"]) == (1, 3)


async def test_parked_events_are_bounded_and_what_makes_room_is_told(
    make: Make, hub: EventBroadcaster, bus: HealthBus
) -> None:
    broadcaster = make(hub.url, None, bus, parked_max_events=2, poison_tries=1)
    await broadcaster.start(5)
    for _ in range(3):
        broadcaster.emit_nowait(NO_EVENT)
    assert await broadcaster.drain(20)
    stats = broadcaster.get_stats()
    assert (stats["parked"], stats["dropped"]) == (2, 1)
    await eventually(lambda: bus.contents("broadcaster_loss"))
    assert bus.contents("broadcaster_loss")[0]["top_rejects"] == [["parked_full", 1]]


async def test_an_event_too_large_for_the_hub_is_parked_and_the_rest_goes_on(make: Make) -> None:
    async with EventBroadcaster(port=0, max_message_bytes=2048) as hub:
        broadcaster = make(hub.url)
        await broadcaster.start(5)
        for n in range(60):  # together too large as well
            broadcaster.emit_nowait(event(n, pad="x" * 4000) if n == 30 else event(n))
        assert await broadcaster.drain(20)
        assert (broadcaster.get_stats()["parked"], hub.get_stats()["events"], hub.get_stats()["gaps"]) == (1, 59, 1)


@pytest.mark.parametrize("code", [1003, 1007, 1009])
async def test_an_event_over_which_a_plain_server_closes_is_found_and_parked(
    make: Make, bus: HealthBus, code: int
) -> None:
    async with Picky(code) as server:
        broadcaster = make(server.url, None, bus)
        await broadcaster.start(5)
        for n in range(40):
            broadcaster.emit_nowait(event(n, **({"bad": 1} if n == 20 else {})))
        assert await broadcaster.drain(20)
        assert broadcaster.get_stats()["parked"] == 1
        assert list(dict.fromkeys(numbers(server.events))) == [n for n in range(40) if n != 20]
        await eventually(lambda: bus.contents("broadcaster_event_parked"))
        assert bus.contents("broadcaster_event_parked")[0]["metrics"]["seq"] == 21


async def test_a_close_that_is_not_about_content_parks_nothing(make: Make) -> None:
    async with Picky(1008) as server:
        broadcaster = make(server.url)
        await broadcaster.start(5)
        await broadcaster.safe_emit(event(1, bad=1))
        await eventually(lambda: server.connects > 10)
        assert broadcaster.get_stats()["parked"] == 0
        server.picky = False
        assert await broadcaster.drain(10)
        assert numbers(server.events) == [1]


async def test_a_parked_event_is_sent_again_at_the_end_while_the_broadcaster_runs(make: Make) -> None:
    async with Picky() as server:
        broadcaster = make(server.url)
        await broadcaster.start(5)
        for n in range(3):
            await broadcaster.safe_emit(event(n, **({"bad": 1} if n == 1 else {})))
        assert await broadcaster.drain(20)
        server.picky = False
        code, out, err = await spill_command("requeue", str(broadcaster.spill_path), "2")
        assert (code, err) == (0, "")
        assert "1 parked events are sent again by process" in out
        await eventually(lambda: numbers(server.events)[-1] == 1)
        await eventually(lambda: broadcaster.get_stats()["parked"] == 0)
        assert list(dict.fromkeys(numbers(server.events))) == [0, 2, 1]
        assert numbers(server.events).count(1) == 1


async def test_a_parked_event_is_sent_again_after_the_next_start(make: Make, spill_path: Path) -> None:
    async with Picky() as server:
        broadcaster = make(server.url, spill_path)
        await broadcaster.start(5)
        await broadcaster.safe_emit(event(1, bad=1))
        assert await broadcaster.drain(20)
        await broadcaster.stop()
        server.picky = False
        code, out, _ = await spill_command("requeue", str(spill_path), "--all")
        assert (code, "after the next start" in out) == (0, True)
        again = make(server.url, spill_path)
        await again.start(5)
        await eventually(lambda: numbers(server.events) == [1])
        await eventually(lambda: again.get_stats()["parked"] == 0)
