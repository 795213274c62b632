"""The four policies at the spill's bounds, by events, bytes and age: what each costs, and that it is told."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from safe_broadcaster import ConnectTimeout, SafeBroadcaster, SpillFull
from support import NOWHERE, HealthBus, PlainServer, event, eventually, eventually_blocking, numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., SafeBroadcaster]


async def down(broadcaster: SafeBroadcaster) -> SafeBroadcaster:
    """Started, with reports, and without a link."""
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.02)
    return broadcaster


async def test_drop_oldest_keeps_the_newest_and_tells_of_the_loss(make: Make, bus: HealthBus, spill_path: Path) -> None:
    broadcaster = await down(make(NOWHERE, spill_path, bus, when_full="drop_oldest", spill_max_events=10))
    for n in range(25):
        assert await broadcaster.safe_emit(event(n)) is False
        await eventually(lambda n=n: numbers(list(broadcaster.spill))[-1] == n)
    await eventually(lambda: len(broadcaster.spill) == 10)
    assert numbers(list(broadcaster.spill)) == list(range(15, 25))
    assert broadcaster.get_stats()["dropped"] == 15
    await eventually(lambda: sum(each["metrics"]["count"] for each in bus.contents("broadcaster_loss")) == 15)
    for loss in bus.contents("broadcaster_loss"):
        assert (loss["success"], loss["top_rejects"][0][0]) == (False, "spill_full")


async def test_drop_newest_keeps_the_oldest_and_tells_of_the_loss(make: Make, bus: HealthBus, spill_path: Path) -> None:
    broadcaster = await down(make(NOWHERE, spill_path, bus, when_full="drop_newest", spill_max_events=10))
    for n in range(25):
        assert await broadcaster.safe_emit(event(n)) is False
    assert numbers(list(broadcaster.spill)) == list(range(10))
    assert broadcaster.get_stats()["dropped"] == 15
    await eventually(lambda: sum(each["metrics"]["count"] for each in bus.contents("broadcaster_loss")) == 15)
    assert bus.contents("broadcaster_loss")[0]["top_rejects"][0][0] == "spill_full"


async def test_raise_refuses_and_the_caller_keeps_the_event(make: Make) -> None:
    broadcaster = make(NOWHERE, when_full="raise", spill_max_events=10)
    for n in range(10):
        await broadcaster.safe_emit(event(n))
    with pytest.raises(SpillFull, match="restore the link, or raise spill_max_events") as caught:
        await broadcaster.safe_emit(event(10))
    assert isinstance(caught.value, BufferError)
    with pytest.raises(SpillFull):
        broadcaster.emit_nowait(event(10))
    stats = broadcaster.get_stats()
    assert (stats["refused"], stats["dropped"], len(broadcaster.spill)) == (2, 0, 10)


async def test_wait_waits_until_there_is_room(make: Make) -> None:
    server = PlainServer()
    async with server:
        pass
    broadcaster = await down(make(server.url, when_full="wait", spill_max_events=10))
    for n in range(10):
        assert await broadcaster.safe_emit(event(n)) is False
    waiting = asyncio.create_task(broadcaster.safe_emit(event(10)))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    async with server:
        assert await asyncio.wait_for(waiting, 5) in (True, False)
        assert await broadcaster.drain(5)
        assert numbers(server.events) == list(range(11))
        assert broadcaster.get_stats()["dropped"] == 0
        await broadcaster.stop()


async def test_wait_lets_a_cancelled_caller_go_and_keeps_its_event(make: Make) -> None:
    server = PlainServer()
    async with server:
        pass
    broadcaster = await down(make(server.url, when_full="wait", spill_max_events=1))
    await broadcaster.safe_emit(event(0))
    cancelled, waiting = (asyncio.create_task(broadcaster.safe_emit(event(n))) for n in (1, 2))
    await asyncio.sleep(0.02)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    async with server:
        await asyncio.wait_for(waiting, 5)
        assert await broadcaster.drain(5)
        assert numbers(server.events) == [0, 1, 2], "accepted at the call: cancelling loses nothing"
        await broadcaster.stop()


async def test_stop_frees_those_who_wait(make: Make) -> None:
    broadcaster = await down(make(NOWHERE, when_full="wait", spill_max_events=1))
    await broadcaster.safe_emit(event(0))
    waiting = asyncio.create_task(broadcaster.safe_emit(event(1)))
    await asyncio.sleep(0)
    await broadcaster.stop(0)
    assert await asyncio.wait_for(waiting, 5) is False


async def test_wait_keeps_the_order_of_the_calls(make: Make) -> None:
    server = PlainServer()
    async with server:
        pass
    broadcaster = await down(make(server.url, when_full="wait", spill_max_events=10))
    waiting = [asyncio.create_task(broadcaster.safe_emit(event(n))) for n in range(2000)]
    await asyncio.sleep(0.02)
    async with server:
        await asyncio.wait_for(asyncio.gather(*waiting), 10)
        assert await broadcaster.drain(5)
        assert numbers(server.events) == list(range(2000))
        await broadcaster.stop()


def test_emit_nowait_waits_in_its_thread(spill_path: Path) -> None:
    broadcaster = SafeBroadcaster(NOWHERE, spill_path, when_full="wait", spill_max_events=1)
    broadcaster.emit_nowait(event(0))
    outcome: list[object] = []

    def emit() -> None:
        outcome.append(broadcaster.emit_nowait(event(1)))

    thread = threading.Thread(target=emit)
    thread.start()
    thread.join(0.1)
    assert outcome == []
    broadcaster._stop_blocking(0)
    thread.join(5)
    assert outcome == [False]
    eventually_blocking(lambda: not thread.is_alive())


@pytest.mark.parametrize("when_full", ["drop_oldest", "drop_newest", "raise"])
async def test_the_bound_in_bytes_holds(make: Make, when_full: str) -> None:
    bound = 1 << 16
    broadcaster = await down(make(NOWHERE, when_full=when_full, spill_max_bytes=bound))
    refused = 0
    for n in range(500):
        try:
            await broadcaster.safe_emit(event(n, text="x" * 500))
        except SpillFull:
            refused += 1
        if n % 20 == 0:
            await asyncio.sleep(0.01)  # so that it reaches the disk
    # There is no third case.
    await eventually(lambda: len(list(broadcaster.spill)) + broadcaster.get_stats()["dropped"] + refused == 500)
    await eventually(lambda: broadcaster.get_stats()["outbox_bytes"] == 0)
    assert broadcaster.get_stats()["spill_bytes"] <= bound
    kept = numbers(list(broadcaster.spill))
    assert 50 < len(kept) < 130
    if when_full == "drop_oldest":
        assert kept[-1] == 499
    else:
        assert kept[0] == 0


async def test_events_that_are_too_old_are_given_up_and_told(make: Make, bus: HealthBus, spill_path: Path) -> None:
    broadcaster = await down(make(NOWHERE, spill_path, bus, spill_max_age=0.2))
    await broadcaster.safe_emit(event(0))
    await eventually(lambda: broadcaster.get_stats()["spill_bytes"] > 0)
    await asyncio.sleep(0.25)
    await broadcaster.safe_emit(event(1))
    await eventually(lambda: numbers(list(broadcaster.spill)) == [1])
    await eventually(lambda: bus.contents("broadcaster_loss"))
    assert bus.contents("broadcaster_loss")[0]["top_rejects"] == [["expired", 1]]
    assert broadcaster.get_stats()["dropped"] == 1


async def test_delivered_is_told_when_its_event_was_dropped(make: Make) -> None:
    broadcaster = await down(make(NOWHERE, when_full="drop_oldest", spill_max_events=3))
    first = asyncio.create_task(broadcaster.safe_emit(event(0), durability="delivered"))
    await asyncio.sleep(0)
    for n in range(1, 10):
        await broadcaster.safe_emit(event(n))
        await asyncio.sleep(0.01)
    with pytest.raises(SpillFull, match="dropped before its delivery"):
        await asyncio.wait_for(first, 5)


async def test_a_stamped_stream_names_its_gap(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url, when_full="drop_oldest", spill_max_events=5, stamp=True)
    for n in range(12):
        await broadcaster.safe_emit(event(n))
        await eventually(lambda n=n: numbers(list(broadcaster.spill))[-1] == n)
    await eventually(lambda: broadcaster.get_stats()["dropped"] == 7)
    await broadcaster.start(5)
    assert await broadcaster.drain(5)
    gap, *events = server.events
    assert (gap["type"], gap["content"]) == ("broadcaster.gap", {"from": 1, "to": 7, "reason": "spill_full"})
    assert [each["_sb"]["seq"] for each in events] == [8, 9, 10, 11, 12]
    assert numbers(events) == [7, 8, 9, 10, 11]


async def test_a_bound_does_not_matter_while_the_link_is_live(make: Make, server: PlainServer) -> None:
    for when_full in ("drop_oldest", "drop_newest", "raise", "wait"):
        server.events.clear()
        broadcaster = make(server.url, when_full=when_full, spill_max_events=10)
        await broadcaster.start(5)
        for n in range(1000):
            assert await broadcaster.safe_emit(event(n)) is True
        assert await broadcaster.drain(5)
        assert numbers(server.events) == list(range(1000))
        assert broadcaster.get_stats()["dropped"] == 0
