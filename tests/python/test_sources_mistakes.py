"""What goes wrong with sources elsewhere cannot be done here, or is told: by error, warning or log."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading

import pytest

from manager import Manager, State, run
from safe_broadcaster import BackgroundTasks, ConfigError, SourceNotStarted, sources
from support import eventually
from virtual import now, virtual


def messages(caplog, level: int = logging.WARNING) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "safe_broadcaster.sources" and record.levelno >= level
    ]


# 1: a source that never emits


def test_a_poll_that_never_has_anything_to_send_is_told_of_once(caplog) -> None:
    @virtual
    async def polls() -> None:
        async def forgets_its_return() -> None:
            pass

        _, tasks = run(sources.poll(forgets_its_return, event_type="x"))
        async with tasks:
            await asyncio.sleep(100)

    polls()
    [told] = messages(caplog)
    assert "has broadcast nothing in 3 rounds" in told
    assert "forgets_its_return returned None each time" in told


def test_a_handler_that_never_returns_anything_is_told_of_once(caplog) -> None:
    @virtual
    async def handles() -> None:
        @sources.on_event("x", to=Manager())
        async def handle() -> None:
            pass

        for _ in range(10):
            await handle()

    handles()
    [told] = messages(caplog)
    assert "its handler returned None each time" in told


# 2: a source that dies of an exception


def bad_fetches():
    async def raises() -> object:
        raise OSError("no database")

    async def hangs() -> object:
        await asyncio.sleep(1e6)
        return 1

    async def heeds_nothing() -> object:
        until = now() + 70
        while now() < until:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(until - now())
        return None

    async def cancels_itself() -> object:
        raise asyncio.CancelledError

    async def garbage() -> object:
        return object()

    async def nan() -> object:
        return float("nan")

    async def cyclic() -> object:
        circle: list = []
        circle.append(circle)
        return circle

    return {
        "no database": raises,
        "not done within 30 s": hangs,
        "has not ended yet": heeds_nothing,
        "cancelled from within": cancels_itself,
        "EventNotSerializable": garbage,
        "nan": nan,
        "cursion": cyclic,
    }


@pytest.mark.parametrize("words", bad_fetches())
def test_a_fetch_that_fails_in_whatever_way_is_told_and_the_source_goes_on(words: str, caplog) -> None:
    @virtual
    async def polls() -> None:
        fetch, good = bad_fetches()[words], False

        async def fetches() -> object:
            return "good" if good else await fetch()

        manager, tasks = run(sources.poll(fetches, event_type="x"))
        async with tasks:
            await asyncio.sleep(66)
            [status] = tasks.status()
            assert status["failures"] >= 2
            assert words in status["last_error"]
            good = True
            await asyncio.sleep(80)
            assert manager.data() == ["good"]
            assert tasks.status()[0]["failures_in_row"] == 0

    caplog.set_level(logging.INFO, "safe_broadcaster.sources")
    polls()
    told = messages(caplog, logging.INFO)
    assert any(words in line for line in told)
    assert "works again" in told[-1]


async def test_a_plain_fetch_that_hangs_takes_one_thread_and_no_more_and_does_not_keep_the_program() -> None:
    go_on = threading.Event()
    fetches = 0

    def fetch() -> str:
        nonlocal fetches
        fetches += 1
        go_on.wait(20)
        return "late"

    manager, tasks = run(sources.poll(fetch, every=0.01, minimum=0.01, timeout=0.05, event_type="x"))
    async with tasks:
        await eventually(lambda: tasks.status()[0]["failures"] > 3)
        assert fetches == 1
        hung = [thread for thread in threading.enumerate() if thread.name.startswith("fetch of x")]
        assert len(hung) == 1
        assert hung[0].daemon
        assert "has not ended yet" in tasks.status()[0]["last_error"]
        go_on.set()
        await eventually(lambda: manager.messages)


async def test_a_plain_fetch_may_raise_what_would_end_a_loop() -> None:
    errors = iter([SystemExit(1), StopIteration(), KeyboardInterrupt()])

    def fetch() -> str:
        for error in errors:
            raise error
        return "good"

    manager, tasks = run(sources.poll(fetch, every=0.01, minimum=0.01, event_type="x"))
    async with tasks:
        await eventually(lambda: manager.messages)
        assert tasks.status()[0]["failures"] == 3


@virtual
async def test_a_manager_that_raises_or_hangs_costs_a_round() -> None:
    manager = Manager()
    _, tasks = run(sources.poll(State(1).fetch, event_type="x"), manager=manager)
    manager.error = OSError("no")
    async with tasks:
        await asyncio.sleep(1)
        manager.error, manager.takes = None, 1e6
        await asyncio.sleep(38)
        assert tasks.status()[0]["failures"] == 2
        manager.takes = 0.0
        await asyncio.sleep(10)
        assert manager.data() == [1]


def test_a_handler_that_raises_is_logged_and_its_caller_goes_on_or_is_told_as_it_wants(caplog) -> None:
    @virtual
    async def handles() -> None:
        manager = Manager()

        @sources.on_event("x", to=manager)
        async def quiet(error: Exception | None) -> str:
            if error is not None:
                raise error
            return "a"

        loud = sources.on_event("y", to=manager, errors="raise")(quiet.__wrapped__)
        assert await quiet(OSError("no row")) is None
        with pytest.raises(OSError, match="no row"):
            await loud(OSError("no row"))
        manager.error = ConnectionError("gone")
        assert await quiet(None) is None
        with pytest.raises(ConnectionError):
            await loud(None)

    handles()
    assert len(messages(caplog, logging.ERROR)) == 4


def test_a_source_whose_run_is_cancelled_by_somebody_or_dies_or_returns_is_started_again(caplog) -> None:
    @virtual
    async def runs() -> None:
        began: list[float] = []

        async def dies() -> None:
            began.append(now())
            if len(began) == 1:
                raise OSError("odd")
            if len(began) == 2:
                return
            await asyncio.sleep(1e6)

        _, tasks = run(dies)
        async with tasks:
            await asyncio.sleep(11)
            assert began == [0, 5, 10]
            for task in asyncio.all_tasks():
                if task.get_name().startswith("run of source"):
                    task.cancel()
            await asyncio.sleep(6)
            assert began == [0, 5, 10, 16]
            [status] = tasks.status()
            assert (status["failures"], status["last_error"]) == (3, "was cancelled by somebody")

    runs()
    told = " | ".join(messages(caplog))
    for words in ("died of OSError: odd", "returned; it should loop", "was cancelled by somebody"):
        assert words in told


def test_a_source_that_does_not_end_is_left_behind_and_told(caplog) -> None:
    @virtual
    async def runs() -> None:
        over = asyncio.Event()

        async def stubborn() -> None:
            while not over.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await over.wait()

        _, tasks = run(stubborn)
        await tasks.start()
        await asyncio.sleep(1)
        await tasks.stop()
        assert now() < 10
        over.set()
        await asyncio.sleep(0.1)

    runs()
    assert "does not heed its cancellation" in messages(caplog)[0]


# 3: a source that floods


@pytest.mark.parametrize("every", [0.1, 0.99])
def test_an_interval_that_is_too_short_is_refused_unless_meant(every: float) -> None:
    with pytest.raises(ConfigError, match=f"every={every} is not allowed: give at least 1 s.*minimum={every}"):
        sources.poll(State().fetch, every=every, event_type="x")
    BackgroundTasks(Manager()).add(meant := sources.poll(State().fetch, every=every, minimum=every, event_type="x"))
    meant.state = "stopped"


@pytest.mark.parametrize("make", [sources.poll, sources.hybrid, sources.conditional])
@pytest.mark.parametrize("every", [0, -1, float("nan"), float("inf"), "5", None])
def test_an_interval_that_is_none_is_refused(make, every: float) -> None:
    with pytest.raises(ConfigError, match=f"every={every!r}"):
        make(State().fetch, every=every, minimum=0.0, event_type="x")


def test_a_handler_that_floods_is_told_of_once_in_a_while(caplog) -> None:
    @virtual
    async def handles() -> None:
        @sources.on_event("x", to=Manager())
        async def handle() -> int:
            return 1

        for _ in range(10):
            for _ in range(300):
                await handle()
            await asyncio.sleep(1)

    handles()
    [told] = messages(caplog)
    assert "floods: more than 100 events in a second" in told


async def test_results_of_plain_handlers_wait_within_a_bound(caplog) -> None:
    manager = Manager()

    def results(**settings):
        @sources.on_event("x", max_waiting=3, **settings)
        def handle(n: int) -> int:
            return n

        return handle

    dropping, raising = results(), results(when_full="raise", errors="raise")
    tasks = BackgroundTasks(manager)
    tasks.add(dropping)
    tasks.add(raising)
    async with tasks:
        for n in range(5):
            dropping(n)
        for n in range(3):
            raising(n)
        with pytest.raises(BufferError, match="3 results"):
            raising(3)
        await eventually(lambda: len(manager.messages) == 6)
        assert sorted(manager.data()) == [0, 0, 1, 1, 2, 2]
        assert [status["dropped"] for status in tasks.status()] == [2, 1]
    assert "the newest is dropped (2 so far)" in messages(caplog)[1]


# 5: a source that was never started (4, a state that is repeated, stands in test_sources.py)


@pytest.mark.parametrize("make", [sources.poll, sources.hybrid, sources.conditional])
def test_a_source_that_is_forgotten_warns_as_a_coroutine_does(make) -> None:
    def forgets() -> None:
        make(State().fetch, event_type="queue_update")
        gc.collect()

    with pytest.warns(RuntimeWarning, match=r"source 'queue_update \(State.fetch\)' was never started"):
        forgets()


def test_background_tasks_that_are_never_started_warn_for_their_sources() -> None:
    def forgets() -> None:
        BackgroundTasks(Manager()).add(sources.poll(State().fetch, event_type="x"))
        gc.collect()

    with pytest.warns(RuntimeWarning, match="never started"):
        forgets()


def test_a_source_that_nobody_was_given_is_told_of_when_others_start(caplog) -> None:
    @virtual
    async def starts() -> None:
        forgotten = sources.poll(State(1).fetch, event_type="forgotten")
        _, tasks = run(sources.poll(State(1).fetch, event_type="x"))
        async with tasks:
            await asyncio.sleep(6)
        forgotten.state = "stopped"

    gc.collect()
    starts()
    assert "source forgotten (State.fetch) was made and given to no BackgroundTasks" in " ".join(messages(caplog))


async def test_a_handler_that_was_never_started_raises() -> None:
    @sources.on_event("x")
    async def handle() -> int:
        raise AssertionError("not begun")

    @sources.on_event("y")
    def plain() -> int:
        raise AssertionError("not begun")

    tasks = BackgroundTasks(Manager())
    for _ in range(2):  # given to nobody, and given to tasks that are not started
        with pytest.raises(SourceNotStarted, match="was never started"):
            await handle()
        with pytest.raises(SourceNotStarted, match="was never started"):
            plain()
        if not tasks.status():
            tasks.add(handle)
            tasks.add(plain)
    for each in (handle, plain):
        each.source.state = "stopped"


def test_an_event_after_the_stop_is_logged(caplog) -> None:
    @virtual
    async def stops() -> None:
        @sources.on_event("x")
        async def handle() -> int:
            return 1

        manager, tasks = run(handle)
        async with tasks:
            await handle()
        assert await handle() == 1
        assert manager.data() == [1]

    stops()
    assert "was stopped: an event is not broadcast" in messages(caplog)[0]


def test_what_plain_handlers_return_around_the_stop_is_told_and_is_no_news_at_the_next_start(caplog) -> None:
    @virtual
    async def stops() -> None:
        @sources.on_event("x")
        def handle(n: int) -> int:
            return n

        manager, tasks = run(handle)
        manager.takes = 1000.0
        async with tasks:
            for n in range(3):
                handle(n)
            await asyncio.sleep(1)
        handle(3)
        manager.takes = 0.0
        async with tasks:
            handle(4)
            await asyncio.sleep(1)
        assert manager.data() == [4]
        assert handle.source.status()["dropped"] == 4

    stops()
    assert [told for told in messages(caplog) if "stopped" in told] == [
        "source x (handle) was stopped: 3 results are not broadcast",
        "source x (handle) was stopped: an event is not broadcast",
    ]


def test_sources_whose_loop_ended_without_a_stop_are_started_in_the_next() -> None:
    state = State(1)
    manager, tasks = run(sources.poll(state.fetch, every=60, event_type="x"))

    async def life() -> None:
        rounds = tasks.status()[0]["rounds"]
        await tasks.start()
        await tasks.start()
        await eventually(lambda: tasks.status()[0]["rounds"] == rounds + 1)
        assert tasks.status()[0]["state"] == "running"

    asyncio.run(life())
    assert tasks.status()[0]["state"] == "stopped"
    asyncio.run(life())
    assert manager.data() == [1]


@virtual
async def test_loops_of_a_subclass_are_all_started() -> None:
    class Tasks(BackgroundTasks):
        async def _broadcast_routes(self) -> None:
            while True:
                await self.websocket_manager.broadcast({"type": "routes", "data": 1})
                await asyncio.sleep(5)

        async def _broadcast_forgotten(self) -> None:
            while True:
                await self.websocket_manager.broadcast({"type": "forgotten", "data": 1})
                await asyncio.sleep(5)

    manager = Manager()
    async with Tasks(manager):
        await asyncio.sleep(1)
    assert {message["type"] for message in manager.messages} == {"routes", "forgotten"}


def test_wrong_arguments_are_named() -> None:
    def wrong(match: str, make, *arguments, **settings) -> None:
        with pytest.raises(ConfigError, match=match):
            make(*arguments, **settings)

    fetch = State().fetch
    wrong("fetch=7 .*give a function", sources.poll, 7, event_type="x")
    wrong("event_type=''", sources.poll, fetch, event_type="")
    wrong("topic=''", sources.poll, fetch, event_type="x", topic="")
    wrong("key=7", sources.poll, fetch, event_type="x", key=7)
    wrong("timeout=0", sources.poll, fetch, event_type="x", timeout=0)
    wrong("timeout='9'", sources.poll, fetch, event_type="x", timeout="9")
    wrong("minimum=-1", sources.poll, fetch, event_type="x", minimum=-1)
    for significant in (0, -0.1, True, "much", float("nan")):
        wrong("significant=", sources.conditional, fetch, event_type="x", significant=significant)
    wrong("key=.*fetch", sources.poll, fetch, event_type="x", key=fetch)
    wrong("significant=.*fetch", sources.conditional, fetch, event_type="x", significant=fetch)
    wrong("listening=7", sources.conditional, fetch, event_type="x", listening=7)
    wrong("errors='no'", sources.on_event, "x", errors="no")
    wrong("when_full='no'", sources.on_event, "x", when_full="no")
    wrong("max_waiting=0", sources.on_event, "x", max_waiting=0)
    wrong("max_waiting='9'", sources.on_event, "x", max_waiting="9")
    wrong("websocket_manager=", sources.on_event, "x", to=object())
    wrong("to= is not allowed for", sources.on_event("x", to=Manager()), lambda: 1)
    wrong("websocket_manager=None", BackgroundTasks, None)
    tasks = BackgroundTasks(Manager())
    wrong("source=7", tasks.add, 7)
    wrong("source=", tasks.add, lambda: 1)
    source = tasks.add(sources.hybrid(fetch, event_type="x"))
    wrong("has a place already", tasks.add, source)
    wrong("has a place already", BackgroundTasks(Manager()).add, source)
    wrong("give an async one", source.on_event, lambda: 1)
    source.state = "stopped"
