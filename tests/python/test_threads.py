"""``emit_nowait``: from any thread, with no event loop, and never stuck."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from safe_broadcaster import BroadcasterClosed, SafeBroadcaster
from support import NOWHERE, QUICK, PlainServer, event, eventually, eventually_blocking, numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., SafeBroadcaster]


async def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work`` in so many threads at once; fail with the first failure."""
    failures: list[BaseException] = []
    gate = threading.Barrier(count)

    def run(n: int) -> None:
        gate.wait()
        try:
            work(n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    await eventually(lambda: not any(thread.is_alive() for thread in threads), 20)
    if failures:
        raise failures[0]


@pytest.mark.parametrize("durability", ["memory", "delivered"])
async def test_many_threads_emit_at_once_and_each_keeps_its_order(
    make: Make, server: PlainServer, durability: str
) -> None:
    count, each = (8, 1000) if durability == "memory" else (8, 50)
    broadcaster = make(server.url)
    await broadcaster.start(5)

    def work(n: int) -> None:
        for i in range(each):
            assert broadcaster.emit_nowait(event(100_000 * n + i), durability=durability) is True  # type: ignore[arg-type]

    await in_threads(count, work)
    assert await broadcaster.drain(10)
    received = numbers(server.events)
    assert len(received) == count * each
    for n in range(count):
        assert [r for r in received if r // 100_000 == n] == [100_000 * n + i for i in range(each)]
    assert broadcaster.emit_count == count * each


def test_no_event_loop_is_needed(spill_path: Path) -> None:
    broadcaster = SafeBroadcaster(NOWHERE, spill_path)
    assert broadcaster.emit_nowait(event(1)) is False
    assert numbers(list(broadcaster.spill)) == [1]
    broadcaster._stop_blocking(0)


async def test_delivered_blocks_its_thread_until_the_peer_has_confirmed(make: Make) -> None:
    async with PlainServer(pongs=False) as server:
        broadcaster = make(server.url, ack_timeout=30)
        await broadcaster.start(5)
        emitting = asyncio.ensure_future(asyncio.to_thread(broadcaster.emit_nowait, event(1), durability="delivered"))
        await eventually(lambda: server.events)
        await asyncio.sleep(0.05)
        assert not emitting.done()
        server.pongs = True
        server.cut()
        assert await asyncio.wait_for(emitting, 5) is True
        await broadcaster.stop()


async def test_a_blocked_thread_holds_no_lock_that_others_need(make: Make) -> None:
    broadcaster = make(NOWHERE)
    blocked = asyncio.ensure_future(asyncio.to_thread(broadcaster.emit_nowait, event(0), durability="delivered"))
    for n in range(1, 100):
        assert await broadcaster.safe_emit(event(n)) is False
    assert len(broadcaster.spill) >= 99
    await broadcaster.stop(0)
    with pytest.raises(BroadcasterClosed):
        await asyncio.wait_for(blocked, 5)


async def test_pressure_slows_threads_and_loses_nothing(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url, outbox_bytes=1 << 16, max_event_bytes=1 << 12)
    await broadcaster.start(5)

    def work(n: int) -> None:
        for i in range(500):
            broadcaster.emit_nowait(event(1000 * n + i, text="x" * 400))

    await in_threads(4, work)
    assert await broadcaster.drain(20)
    assert sorted(numbers(server.events)) == sorted(1000 * n + i for n in range(4) for i in range(500))
    assert broadcaster.get_stats()["dropped"] == 0


async def test_an_emit_on_the_loops_thread_under_pressure_comes_back(make: Make, server: PlainServer) -> None:
    """The link is served by another thread, so waiting here cannot wait for this thread."""
    broadcaster = make(server.url, outbox_bytes=1 << 16, max_event_bytes=1 << 12)
    await broadcaster.start(5)
    for n in range(2000):
        broadcaster.emit_nowait(event(n, text="x" * 400))
    assert await broadcaster.drain(20)
    assert numbers(server.events) == list(range(2000))


async def test_stop_from_another_loop_while_threads_emit_answers_everyone(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    accepted: list[int] = []

    def work(n: int) -> None:
        for i in range(1_000_000):
            try:
                broadcaster.emit_nowait(event(10_000_000 * n + i))
            except BroadcasterClosed:
                return
            accepted.append(10_000_000 * n + i)

    working = asyncio.ensure_future(in_threads(4, work))
    await eventually(lambda: len(accepted) > 1000)
    await asyncio.to_thread(lambda: asyncio.run(broadcaster.stop(10)))
    await working
    assert set(accepted) <= set(numbers(server.events)), "whatever was accepted has arrived"


def test_ctrl_c_ends_a_wait_and_nothing_is_lost(spill_path: Path) -> None:
    broadcaster = SafeBroadcaster(NOWHERE, spill_path, **QUICK)
    # Python's own handler, whatever a test runner has put in its place.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            broadcaster.emit_nowait(event(1), durability="delivered")
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert broadcaster.emit_nowait(event(2)) is False
    eventually_blocking(lambda: numbers(list(broadcaster.spill)) == [1, 2])
    broadcaster._stop_blocking(0)
