"""One hub for the whole program, whoever asks for it and from wherever."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from safe_broadcaster import ConnectRefused, EventBroadcaster, get_broadcaster, stop_broadcaster


@pytest.fixture(autouse=True)
async def _clean():
    yield
    await stop_broadcaster()


async def test_all_get_the_same_one_started() -> None:
    hubs = await asyncio.gather(*(get_broadcaster(None) for _ in range(20)))
    assert len(set(map(id, hubs))) == 1
    assert hubs[0].is_listener_healthy()
    assert hubs[0].port > 0


async def test_threads_with_loops_of_their_own_get_the_same_one() -> None:
    hubs, gate = [], threading.Barrier(8)

    def ask() -> None:
        gate.wait()
        hubs.append(asyncio.run(ask_twice()))

    async def ask_twice() -> EventBroadcaster:
        hub = await get_broadcaster()
        assert await get_broadcaster() is hub
        assert await hub.broadcast("a", 1) == 0
        return hub

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert len(hubs) == 8
    assert len(set(map(id, hubs))) == 1
    assert hubs[0].get_stats()["events"] == 8


async def test_after_a_stop_there_is_a_new_one() -> None:
    first = await get_broadcaster()
    await stop_broadcaster()
    assert not first.is_listener_healthy()
    await stop_broadcaster()
    second = await get_broadcaster()
    assert second is not first
    assert second.is_listener_healthy()


async def test_a_start_that_fails_is_told_to_all_and_tried_again_by_the_next() -> None:
    async with EventBroadcaster(port=0) as other:
        asked = [get_broadcaster(port=other.port) for _ in range(3)]
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, ConnectRefused)
    assert (await get_broadcaster()).is_listener_healthy()


async def test_whoever_is_cancelled_while_waiting_spoils_it_for_nobody() -> None:
    tasks = [asyncio.create_task(get_broadcaster()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await tasks[1]
    assert await tasks[0] is await tasks[2] is await get_broadcaster()
