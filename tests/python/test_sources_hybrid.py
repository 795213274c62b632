"""What is told at once is not told again by the poll, and what is not told is found by it."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from manager import Manager, State, run
from safe_broadcaster import BackgroundTasks, SourceNotStarted, sources
from support import eventually
from virtual import virtual


@virtual
async def test_what_an_event_brought_is_no_news_for_the_poll() -> None:
    state = State({"phase": 1})
    queue = sources.hybrid(state.fetch, every=5, event_type="queue_update")
    manager, tasks = run(queue)
    async with tasks:
        await asyncio.sleep(1)
        state.value = {"phase": 2}
        await queue.notify({"phase": 2})
        assert manager.times == [0, 1], "at once"
        await asyncio.sleep(10)
        assert manager.data() == [{"phase": 1}, {"phase": 2}]
        await queue.notify({"phase": 2})
        assert len(manager.messages) == 2, "an event that says nothing new"
        state.value = {"phase": 3}
        await asyncio.sleep(5)
        assert manager.data()[-1] == {"phase": 3}, "a missed event is found"


@virtual
async def test_an_event_without_a_state_has_it_fetched_at_once_and_many_share_a_fetch() -> None:
    state = State(1)
    queue = sources.hybrid(state.fetch, every=60, event_type="x")
    manager, tasks = run(queue)
    async with tasks:
        await asyncio.sleep(1)
        state.value, state.takes = 2, 1.0
        await asyncio.gather(*(queue.notify() for _ in range(100)))
        assert (manager.data(), state.fetches) == ([1, 2], 2)
        early = asyncio.create_task(queue.notify())
        await asyncio.sleep(0.5)
        state.value = 3
        await queue.notify()
        assert early.done()
        assert (manager.data(), state.fetches) == ([1, 2, 3], 4), "a fetch under way may have read before the event"


async def test_every_call_in_a_row_has_a_plain_function_fetch_the_state_anew() -> None:
    count, manager = itertools.count(1), Manager()
    tasks = BackgroundTasks(manager)
    source = tasks.add(sources.hybrid(lambda: next(count), every=5.0, event_type="x"))
    async with tasks:
        for _ in range(200):
            await source.notify()
    assert (source.emitted, source.failures) == (200, 0)


@virtual
async def test_a_fetch_that_an_event_overtook_does_not_bring_the_past_back() -> None:
    state = State("old")
    queue = sources.hybrid(state.fetch, every=5, event_type="x")
    manager, tasks = run(queue)
    async with tasks:
        await asyncio.sleep(1)
        state.takes = 2.0
        await asyncio.sleep(5)  # it has read "old" and is on its way back
        state.value = "new"
        await queue.notify("new")
        await asyncio.sleep(20)
    assert manager.data() == ["old", "new"]


@virtual
async def test_events_that_never_end_do_not_make_it_fetch_for_ever() -> None:
    state = State(0)
    state.takes = 1.0
    queue = sources.hybrid(state.fetch, every=5, event_type="x")
    _, tasks = run(queue)
    async with tasks:
        for n in range(1, 400):
            await queue.notify(n)
            await asyncio.sleep(0.1)
    assert state.fetches <= 2 * 40 / 5 + 2


@virtual
async def test_a_hybrid_handler_tells_what_it_returns_or_has_it_fetched() -> None:
    state = State("a")
    queue = sources.hybrid(state.fetch, every=60, event_type="x")
    manager, tasks = run(queue)

    @queue.on_event
    async def changed(what: object) -> object:
        return what

    async with tasks:
        await asyncio.sleep(1)
        assert await changed("b") == "b"
        state.value = "c"
        assert await changed(None) is None
    assert manager.data() == ["a", "b", "c"]
    assert tasks.status()[0]["events"] == 2


async def test_a_hybrid_source_may_be_told_from_another_loop() -> None:
    queue = sources.hybrid(State("a").fetch, every=60, event_type="x")
    manager, tasks = run(queue)
    async with tasks:
        await eventually(lambda: manager.messages)
        await asyncio.to_thread(asyncio.run, queue.notify("b"))
        assert manager.data() == ["a", "b"]


async def test_sources_start_again_in_another_loop() -> None:
    state = State("a")
    queue = sources.hybrid(state.fetch, every=60, event_type="x")

    @sources.on_event("y")
    def handle(n: int) -> int:
        return n

    manager, tasks = run(queue, handle)

    async def life(n: int) -> None:
        async with tasks:
            handle(n)
            state.value = n
            await queue.notify()
            await eventually(lambda: n in [message["data"] for message in manager.messages if message["type"] == "y"])

    for n in range(3):
        await asyncio.to_thread(asyncio.run, life(n))
    assert [message["data"] for message in manager.messages if message["type"] == "x"][-1] == 2


@virtual
async def test_whoever_waits_for_a_fetch_does_not_wait_beyond_the_end() -> None:
    queue = sources.hybrid(State(1).fetch, event_type="x")
    _, tasks = run(queue)
    await tasks.start()
    await asyncio.sleep(1)
    for task in asyncio.all_tasks():
        if task.get_name().startswith("run of source"):
            task.cancel()
    await asyncio.sleep(1)
    waiting = asyncio.create_task(queue.notify())  # it is started again in four seconds
    await asyncio.sleep(1)
    await tasks.stop()
    await asyncio.wait_for(waiting, 1)


async def test_a_hybrid_source_that_does_not_run_cannot_be_told() -> None:
    queue = sources.hybrid(State(1).fetch, event_type="x")
    _, tasks = run(queue)
    with pytest.raises(SourceNotStarted, match="does not run"):
        await queue.notify(2)
    async with tasks:
        pass
    with pytest.raises(SourceNotStarted):
        await queue.notify()
