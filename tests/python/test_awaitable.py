"""What ``safe_emit`` returns is a coroutine to everything that takes one, and the event is accepted at the call."""

from __future__ import annotations

import asyncio
import collections.abc
import copy
import gc
import inspect
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import BroadcasterClosed, EventBroadcaster, SafeBroadcaster
from support import NOWHERE, QUICK, AsyncClient, PlainServer, event, eventually, numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., SafeBroadcaster]


@pytest.fixture
async def live(make: Make, server: PlainServer) -> SafeBroadcaster:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    return broadcaster


async def test_await_gives_true_while_live_and_false_while_not(make: Make, live: SafeBroadcaster) -> None:
    assert await live.safe_emit(event(1)) is True
    assert await make(NOWHERE).safe_emit(event(1)) is False


async def test_it_is_a_coroutine_to_asyncio_and_inspect(live: SafeBroadcaster) -> None:
    done, waiting = live.safe_emit(event(1)), live.safe_emit(event(2), durability="delivered")
    for each in (done, waiting):
        assert isinstance(each, collections.abc.Coroutine)
        assert asyncio.iscoroutine(each)
        assert inspect.isawaitable(each)


@pytest.mark.parametrize("durability", ["memory", "power", "delivered"])
async def test_create_task_takes_it(live: SafeBroadcaster, durability: str) -> None:
    task = asyncio.create_task(live.safe_emit(event(1), durability=durability))
    assert await task is True
    repr(task)


@pytest.mark.parametrize("durability", ["memory", "power", "delivered"])
async def test_gather_takes_many(live: SafeBroadcaster, server: PlainServer, durability: str) -> None:
    outcomes = await asyncio.gather(*(live.safe_emit(event(n), durability=durability) for n in range(100)))
    assert outcomes == [True] * 100
    await eventually(lambda: numbers(server.events) == list(range(100)))


@pytest.mark.parametrize("durability", ["memory", "power", "delivered"])
async def test_wait_for_and_shield_take_it(live: SafeBroadcaster, durability: str) -> None:
    assert await asyncio.wait_for(live.safe_emit(event(1), durability=durability), 5) is True
    assert await asyncio.shield(live.safe_emit(event(2), durability=durability)) is True


async def test_as_completed_gives_each_outcome_once(make: Make, live: SafeBroadcaster) -> None:
    down = make(NOWHERE)
    given = [live.safe_emit(event(1)), live.safe_emit(event(2)), down.safe_emit(event(1)), down.safe_emit(event(2))]
    assert len({id(each) for each in given}) == 4, "a shared object would be counted once"
    outcomes = [await each for each in asyncio.as_completed(given)]
    assert sorted(outcomes) == [False, False, True, True]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup came with Python 3.11")
@pytest.mark.parametrize("durability", ["memory", "power", "delivered"])
async def test_task_group_takes_it(live: SafeBroadcaster, durability: str) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(live.safe_emit(event(n), durability=durability)) for n in range(10)]
    assert all(task.result() is True for task in tasks)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_eager_tasks_take_it(live: SafeBroadcaster) -> None:
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    try:
        task = asyncio.create_task(live.safe_emit(event(1)))
        assert task.done()
        assert await task is True
    finally:
        asyncio.get_running_loop().set_task_factory(None)


async def test_await_from_a_coroutine_function_returns_its_value(live: SafeBroadcaster) -> None:
    async def outer() -> bool:
        return await live.safe_emit(event(1))

    assert await asyncio.create_task(outer()) is True


def test_without_a_loop_send_none_raises_stop_iteration_at_once(spill_path: Path) -> None:
    broadcaster = SafeBroadcaster(
        NOWHERE, spill_path, durability="memory"
    )  # no file that would have to be opened first
    outcome = broadcaster.safe_emit(event(1))
    with pytest.raises(StopIteration) as stopped:
        outcome.send(None)
    assert stopped.value.value is False
    assert broadcaster.spill_count == 1
    broadcaster._stop_blocking(0)


async def test_the_fast_path_never_lets_the_loop_run(live: SafeBroadcaster) -> None:
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1

    asyncio.get_running_loop().call_soon(turn)
    for n in range(100):
        await live.safe_emit(event(n))
    assert turns == 0
    await asyncio.sleep(0)
    assert turns == 1


async def test_the_event_is_accepted_at_the_call(live: SafeBroadcaster, server: PlainServer) -> None:
    given: dict[str, Any] = event(1)
    outcome = live.safe_emit(given)
    given["content"]["n"] = 2
    await eventually(lambda: numbers(server.events) == [1])
    assert await outcome is True


@pytest.mark.parametrize("durability", ["memory", "power", "delivered"])
async def test_a_forgotten_await_loses_nothing_and_warns_of_nothing(
    live: SafeBroadcaster, server: PlainServer, durability: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        live.safe_emit(event(1), durability=durability)
        gc.collect()
    assert caught == []
    await eventually(lambda: numbers(server.events) == [1])


async def test_a_cancelled_await_loses_nothing(make: Make) -> None:
    async with PlainServer(pongs=False) as mute:
        broadcaster = make(mute.url, ack_timeout=30)
        await broadcaster.start(5)
        task = asyncio.create_task(broadcaster.safe_emit(event(1), durability="delivered"))
        await eventually(lambda: mute.events)
        assert not task.done(), "nothing has confirmed it"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(broadcaster.safe_emit(event(2), durability="delivered"), 0.02)
        assert broadcaster.get_stats()["acked_seq"] == 0
        mute.pongs = True
        mute.cut()
        await eventually(lambda: broadcaster.get_stats()["acked_seq"] == 2)
        assert set(numbers(mute.events)) == {1, 2}


async def test_a_task_cancelled_before_its_first_step_loses_nothing(live: SafeBroadcaster, server: PlainServer) -> None:
    tasks = [asyncio.create_task(live.safe_emit(event(n), durability="delivered")) for n in range(2)]
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in outcomes)
    await eventually(lambda: numbers(server.events) == [0, 1])


async def test_it_can_be_closed_and_thrown_into(live: SafeBroadcaster) -> None:
    for durability in ("memory", "power", "delivered"):
        outcome = live.safe_emit(event(1), durability=durability)
        outcome.close()
        with pytest.raises(KeyError):
            live.safe_emit(event(1), durability=durability).throw(KeyError("x"))
    with pytest.raises(TypeError):
        live.safe_emit(event(1)).throw(42)


async def test_it_cannot_be_made_or_copied_out_of_nothing(live: SafeBroadcaster) -> None:
    """An instance without a value inside would crash the process when awaited."""
    outcome = live.safe_emit(event(1))
    with pytest.raises(TypeError):
        type(outcome)()
    with pytest.raises(TypeError):
        object.__new__(type(outcome))
    with pytest.raises(TypeError):
        copy.copy(outcome)
    assert await outcome is True


async def test_delivered_ends_when_the_peer_has_confirmed(live: SafeBroadcaster) -> None:
    assert await live.safe_emit(event(1), durability="delivered") is True
    assert live.get_stats()["acked_seq"] == 1


async def test_delivered_to_a_hub_does_not_wait_for_the_company_of_other_acks(make: Make) -> None:
    async with EventBroadcaster(port=0) as hub:
        for client in (hub.url, hub.client):
            broadcaster = make(client)
            await broadcaster.start(5)
            took: list[float] = []
            for n in range(50):
                began = time.perf_counter()
                assert await broadcaster.safe_emit(event(n), durability="delivered") is True
                took.append(time.perf_counter() - began)
            assert min(took) < 0.01, "an ack that nobody asks for comes after 20 ms"
            await broadcaster.stop()


async def test_delivered_by_default_by_setting(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url, durability="delivered")
    await broadcaster.start(5)
    assert await broadcaster.safe_emit(event(1)) is True
    assert broadcaster.get_stats()["acked_seq"] == 1


async def test_delivered_before_start_ends_after_start(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    task = asyncio.create_task(broadcaster.safe_emit(event(1), durability="delivered"))
    await asyncio.sleep(0)
    assert not task.done()
    await broadcaster.start(5)
    assert await asyncio.wait_for(task, 5) is True


async def test_delivered_still_open_at_stop_raises_closed(make: Make) -> None:
    broadcaster = make(NOWHERE)
    task = asyncio.create_task(broadcaster.safe_emit(event(1), durability="delivered"))
    await asyncio.sleep(0)
    await broadcaster.stop(0)
    with pytest.raises(BroadcasterClosed):
        await asyncio.wait_for(task, 5)


async def test_a_hundred_thousand_awaits_leak_nothing(live: SafeBroadcaster, server: PlainServer) -> None:
    given = event(0)

    async def emit(times: int) -> None:
        for n in range(times):
            await live.safe_emit(given)
            if n % 1000 == 0:
                await live.drain(5)

    await emit(2000)
    server.events.clear()
    gc.collect()
    objects, trues = len(gc.get_objects()), sys.getrefcount(True)  # noqa: FBT003 - it is what awaits give
    type_refs, given_refs = sys.getrefcount(type(live.safe_emit(given))), sys.getrefcount(given)
    blocks = sys.getallocatedblocks()
    await emit(100_000)
    await live.drain(10)
    server.events.clear()
    gc.collect()
    assert sys.getrefcount(given) == given_refs
    assert abs(sys.getrefcount(type(live.safe_emit(given))) - type_refs) < 1000
    assert abs(sys.getrefcount(True) - trues) < 1000  # noqa: FBT003
    assert len(gc.get_objects()) - objects < 1000
    assert sys.getallocatedblocks() - blocks < 10_000


@pytest.mark.parametrize("durability", ["power", "delivered"])
async def test_outcomes_that_wait_leak_nothing(live: SafeBroadcaster, durability: str) -> None:
    async def emit(times: int) -> None:
        for n in range(0, times, 100):
            await asyncio.gather(*(live.safe_emit(event(n), durability=durability) for _ in range(100)))
        assert await live.drain(5)

    await emit(200)
    gc.collect()
    before = len(gc.get_objects())
    await emit(2000)
    gc.collect()
    assert len(gc.get_objects()) - before < 4500, "2000 events in the server's list have two dicts each"


def test_one_broadcaster_serves_two_runs_of_asyncio(spill_path: Path) -> None:
    """Seed 000's users call ``asyncio.run`` more than once; the broadcaster is not bound to the first loop."""
    broadcaster = SafeBroadcaster(NOWHERE, spill_path, **QUICK)

    async def first() -> None:
        async with PlainServer() as server:
            broadcaster_port.append(server.port)
            moved = SafeBroadcaster(server.url, spill_path.with_name("moved.db"), **QUICK)
            kept.append(moved)
            await moved.start(5)
            assert await moved.safe_emit(event(1), durability="delivered") is True

    async def second() -> None:
        server = PlainServer()
        server.port = broadcaster_port[0]
        async with server:
            assert await kept[0].safe_emit(event(2)) in (True, False)
            await kept[0].wait_connected(5)
            assert await kept[0].drain(5)
            assert numbers(server.events) == [2]
            assert await kept[0].safe_emit(event(3), durability="delivered") is True
            await kept[0].stop()

    broadcaster_port: list[int] = []
    kept: list[SafeBroadcaster] = []
    asyncio.run(first())
    asyncio.run(second())
    broadcaster._stop_blocking(0)


def test_reports_and_duck_typed_clients_move_to_the_loop_that_starts_again(spill_path: Path) -> None:
    client = AsyncClient()
    reports: list[str] = []

    class Bus:
        def inject(self, report: dict[str, Any]) -> None:
            reports.append(report["content"]["event_type"])

    broadcaster = SafeBroadcaster(client, spill_path, Bus(), **QUICK)

    async def first() -> None:
        await broadcaster.start(5)
        assert await broadcaster.safe_emit(event(1), durability="delivered") is True

    async def second() -> None:
        reports.clear()
        client.up = False
        await broadcaster.start(5)
        assert await asyncio.wait_for(broadcaster.safe_emit(event(2), durability="delivered"), 5) is True
        await eventually(lambda: "broadcaster_ready" in reports)
        await broadcaster.stop()

    asyncio.run(first())
    asyncio.run(second())
    assert numbers(client.sent) == [1, 2]


def _emit_in_own_loop(new_loop: Callable[[], asyncio.AbstractEventLoop], work: Callable[[], Any]) -> None:
    loop = new_loop()
    try:
        loop.run_until_complete(work())
    finally:
        loop.close()


def test_several_loops_in_threads_share_one_broadcaster(spill_path: Path) -> None:
    threads, each = 4, 50
    failures: list[BaseException] = []

    async def main() -> None:
        async with PlainServer() as server:
            broadcaster = SafeBroadcaster(server.url, spill_path, **QUICK)

            async def work(base: int) -> None:
                await broadcaster.ready.wait()
                for n in range(each):
                    assert await broadcaster.safe_emit(event(base + n), durability="delivered") is True

            def run(base: int) -> None:
                try:
                    asyncio.run(work(base))
                except BaseException as error:
                    failures.append(error)

            running = [threading.Thread(target=run, args=(1000 * n,)) for n in range(threads)]
            for thread in running:
                thread.start()
            await broadcaster.start(5)
            await eventually(lambda: not any(thread.is_alive() for thread in running))
            await broadcaster.stop()
            received = numbers(server.events)
        assert sorted(received) == [1000 * t + n for t in range(threads) for n in range(each)]
        for t in range(threads):
            own = [n for n in received if n // 1000 == t]
            assert own == sorted(own), "the order of one caller is kept"

    asyncio.run(main())
    assert failures == []


def test_uvloop_takes_everything_that_asyncio_takes(spill_path: Path) -> None:
    uvloop = pytest.importorskip("uvloop", reason="uvloop has no wheel for this Python")

    async def main() -> None:
        async with PlainServer() as server:
            broadcaster = SafeBroadcaster(server.url, spill_path, **QUICK)
            await broadcaster.start(5)
            assert await broadcaster.safe_emit(event(0)) is True
            outcomes = await asyncio.gather(
                asyncio.create_task(broadcaster.safe_emit(event(1))),
                broadcaster.safe_emit(event(2), durability="delivered"),
                asyncio.wait_for(broadcaster.safe_emit(event(3)), 5),
            )
            assert outcomes == [True] * 3
            assert await broadcaster.drain(5)
            assert numbers(server.events) == [0, 1, 2, 3]
            await broadcaster.stop()

    _emit_in_own_loop(uvloop.new_event_loop, main)
