"""States are polled and sent when they change, events at once, and nothing twice."""

from __future__ import annotations

import asyncio
import threading

import pytest

from manager import Manager, State, run
from safe_broadcaster import (
    BackgroundTasks,
    BootSequence,
    ConfigError,
    EventBroadcaster,
    Heartbeat,
    SafeBroadcaster,
    sources,
)
from safe_broadcaster.emitter import _Outcome
from support import NOWHERE, eventually
from virtual import now, virtual


@virtual
async def test_a_poll_sends_the_first_state_and_then_what_has_changed() -> None:
    state = State({"queue": 1})
    manager, tasks = run(sources.poll(state.fetch, every=5, event_type="queue_update", topic="queue/a"))
    async with tasks:
        await asyncio.sleep(12)
        assert manager.messages == [{"type": "queue_update", "data": {"queue": 1}, "topic": "queue/a"}]
        state.value = {"queue": 2}
        await asyncio.sleep(5)
        assert manager.data() == [{"queue": 1}, {"queue": 2}]
        assert manager.times == [0, 15]
    assert state.fetches == 4
    [status] = tasks.status()
    assert (status["state"], status["emitted"], status["unchanged"], status["failures"]) == ("stopped", 2, 2, 0)


@virtual
async def test_a_state_that_is_changed_in_place_is_noticed_and_the_order_of_names_is_no_change() -> None:
    state = State({"a": 1, "b": [1]})
    manager, tasks = run(sources.poll(state.fetch, event_type="x"))
    async with tasks:
        await asyncio.sleep(1)
        state.value["b"].append(2)
        await asyncio.sleep(5)
        state.value = {"b": [1, 2], "a": 1}
        await asyncio.sleep(5)
    assert len(manager.messages) == 2


class Row:
    def __init__(self, count: int) -> None:
        self.count = count


@pytest.mark.parametrize("key", ["count", lambda state: state["count"]])
@virtual
async def test_only_what_the_key_gives_is_compared(key) -> None:
    state = State({"count": 1, "at": 0})
    manager, tasks = run(sources.poll(state.fetch, event_type="x", key=key))
    async with tasks:
        for at in range(1, 4):
            await asyncio.sleep(5)
            state.value = {"count": 1 + at // 3, "at": at}
        await asyncio.sleep(5)
    assert manager.data() == [{"count": 1, "at": 0}, {"count": 2, "at": 3}]


@virtual
async def test_none_is_no_state() -> None:
    state = State()
    manager, tasks = run(sources.poll(state.fetch, event_type="x"))
    async with tasks:
        await asyncio.sleep(6)
        state.value = 0
        await asyncio.sleep(5)
    assert manager.data() == [0], "and what is merely falsy is one"


async def test_a_plain_fetch_runs_beside_the_loop() -> None:
    asked = threading.Event()
    go_on = threading.Event()

    def fetch() -> str:
        asked.set()
        go_on.wait(20)
        return threading.current_thread().name

    manager, tasks = run(sources.poll(fetch, event_type="x"))
    async with tasks:
        await eventually(asked.is_set)
        go_on.set()
        await eventually(lambda: manager.messages)
    assert "fetch of x" in manager.data()[0]


@virtual
async def test_a_state_that_could_not_be_sent_is_sent_at_the_next_poll() -> None:
    manager = Manager()
    manager.error = OSError("no")
    _, tasks = run(sources.poll(State(1).fetch, event_type="x"), manager=manager)
    async with tasks:
        await asyncio.sleep(1)
        manager.error = None
        await asyncio.sleep(5)
    assert manager.data() == [1]


@virtual
async def test_a_conditional_source_asks_nobody_while_nobody_listens() -> None:
    state, manager = State(1), Manager()
    manager.active_connections = []
    _, tasks = run(sources.conditional(state.fetch, event_type="x"), manager=manager)
    async with tasks:
        await asyncio.sleep(11)
        assert (state.fetches, tasks.status()[0]["unheard"]) == (0, 3)
        manager.active_connections = [object()]
        await asyncio.sleep(5)
        assert manager.data() == [1]


@virtual
async def test_who_listens_may_be_told_by_a_function() -> None:
    state, listeners = State(1), []
    manager, tasks = run(sources.conditional(state.fetch, event_type="x", listening=lambda: listeners))
    async with tasks:
        await asyncio.sleep(1)
        assert manager.messages == []
        listeners.append(1)
        await asyncio.sleep(5)
        assert manager.data() == [1]


@virtual
async def test_who_listens_may_have_to_be_awaited() -> None:
    class AsyncManager(Manager):
        count = 0

        async def get_connection_count(self) -> int:
            return self.count

    answers = [False, False, True]

    async def listening() -> bool:
        return answers.pop(0) if answers else True

    manager = AsyncManager()
    asked = sources.conditional(State("a").fetch, every=5, event_type="x", listening=listening)
    known = sources.conditional(State("b").fetch, every=5, event_type="x")
    _, tasks = run(asked, known, manager=manager)
    async with tasks:
        await asyncio.sleep(7)
        assert (asked.unheard, known.unheard, manager.data()) == (2, 2, [])
        manager.count = 1
        await asyncio.sleep(5)
    assert sorted(manager.data()) == ["a", "b"]


@virtual
async def test_a_change_counts_by_its_size_and_a_slow_drift_is_told_in_the_end() -> None:
    state = State({"count": 100, "name": "a"})
    manager, tasks = run(sources.conditional(state.fetch, event_type="x", significant=0.1))
    async with tasks:
        for count in (104, 108, 110, 112, 113):  # 110 is a tenth and no more
            await asyncio.sleep(5)
            state.value = {"count": count, "name": "a"}
        await asyncio.sleep(5)
        assert [data["count"] for data in manager.data()] == [100, 112]
        state.value = {"count": 112, "name": "b"}
        await asyncio.sleep(5)
        assert manager.data()[-1]["name"] == "b", "what is no number counts as it is"
        assert tasks.status()[0]["insignificant"] == 4


def test_the_measure_of_a_change_is_that_of_the_pattern() -> None:
    assert sources.relative_change(110, 100) == pytest.approx(0.1)
    assert sources.relative_change(0, -50) == pytest.approx(1)
    assert sources.relative_change(0.5, 0.2) == pytest.approx(0.3), "below 1 it is the difference"


@virtual
async def test_a_predicate_sees_the_new_state_and_the_last_one_that_was_sent_as_it_was_then() -> None:
    state, seen = State({"count": 1}), []

    def significant(new, old) -> bool:
        seen.append((new["count"], old["count"]))
        return new["count"] - old["count"] > 1

    manager, tasks = run(sources.conditional(state.fetch, event_type="x", significant=significant))
    async with tasks:
        for _ in range(3):
            await asyncio.sleep(5)
            state.value["count"] += 1
        await asyncio.sleep(5)
    assert seen == [(2, 1), (3, 1), (4, 3)]
    assert [data["count"] for data in manager.data()] != [1, 3], "the manager kept the state itself"
    assert len(manager.messages) == 2


@virtual
async def test_an_event_handler_broadcasts_what_it_returns_and_returns_it() -> None:
    manager = Manager()

    @sources.on_event("item_update", to=manager)
    async def update(item: int, *, owner: str) -> dict:
        """Update an item."""
        return {"item": item, "owner": owner}

    assert await update(7, owner="ada") == {"item": 7, "owner": "ada"}
    assert manager.messages == [{"type": "item_update", "data": {"item": 7, "owner": "ada"}}]
    assert (update.__name__, update.__doc__) == ("update", "Update an item.")


@virtual
async def test_a_handler_may_be_a_method_and_say_nothing() -> None:
    manager = Manager()

    class Coordinator:
        def __init__(self) -> None:
            self.done = 0

        @sources.on_event("queue_update")
        async def completed(self, news: object) -> object:
            self.done += 1
            return news

    coordinator = Coordinator()
    tasks = BackgroundTasks(manager)
    tasks.add(coordinator.completed)
    async with tasks:
        assert await coordinator.completed(None) is None
        assert await coordinator.completed("a") == "a"
    assert (manager.data(), coordinator.done) == (["a"], 2)


async def test_plain_handlers_in_threads_have_their_results_sent_in_order() -> None:
    @sources.on_event("x")
    def handle(n: int) -> int:
        return n

    manager, tasks = run(handle)
    async with tasks:
        assert handle(0) == 0
        await asyncio.to_thread(lambda: [handle(n) for n in range(1, 100)])
        await eventually(lambda: len(manager.messages) == 100)
    assert manager.data() == list(range(100))


@virtual
async def test_a_source_may_be_added_while_the_others_run_and_they_may_run_again() -> None:
    manager, tasks = run(sources.poll(State(1).fetch, event_type="a"))
    async with tasks:
        tasks.add(sources.poll(State(2).fetch, event_type="b"))
        await asyncio.sleep(1)
    assert sorted(manager.data()) == [1, 2]
    async with tasks:
        await asyncio.sleep(6)
    assert sorted(manager.data()) == [1, 2], "what was sent is still known"
    await tasks.stop()


async def test_sources_broadcast_on_a_hub_or_through_a_broadcaster(tmp_path) -> None:
    async with EventBroadcaster(port=0) as hub, SafeBroadcaster(hub.client, tmp_path / "a.db") as broadcaster:
        for target, kind in ((hub, "of.hub"), (broadcaster, "of.engine")):
            _, tasks = run(sources.poll(State({"n": 1}).fetch, event_type=kind, topic="t"), manager=target)
            async with tasks:
                await eventually(lambda: kind in str(hub.get_messages_since(0)))  # noqa: B023 - waited for here
        events = [message["data"] for message in hub.get_messages_since(0)]
        assert events == [{"type": kind, "data": {"n": 1}, "topic": "t"} for kind in ("of.hub", "of.engine")]


@virtual
async def test_what_a_broadcaster_has_not_accepted_in_time_is_sent_again() -> None:
    sent = []

    class Full:
        """Its memory is full at first, and it is to wait: then the await accepts."""

        def safe_emit(self, event: dict):
            async def accept() -> bool:
                await asyncio.sleep(0 if now() > 20 else 1000)
                sent.append(event["data"])
                return True

            return _Outcome(accept, is_accepted=False)

    source = sources.poll(State("a").fetch, every=5, event_type="x", timeout=4)
    _, tasks = run(source, manager=Full())
    async with tasks:
        await asyncio.sleep(40)
    assert (sent, source.emitted) == (["a"], 1)
    assert source.failures > 0


async def test_what_a_broadcaster_has_accepted_is_not_sent_again_because_its_link_is_down(make) -> None:
    broadcaster = make(NOWHERE, durability="delivered")
    source = sources.poll(State(1).fetch, every=0.01, minimum=0.01, event_type="x", timeout=0.05)
    _, tasks = run(source, manager=broadcaster)
    async with tasks:
        await eventually(lambda: source.unchanged > 3)
    assert (source.emitted, source.failures) == (1, 0)
    assert broadcaster.get_stats()["last_seq"] == 1


async def test_a_hub_knows_whether_somebody_listens_and_a_broadcaster_does_not(tmp_path) -> None:
    from websockets.asyncio.client import connect

    state = State(1)
    async with EventBroadcaster(port=0) as hub:
        _, tasks = run(sources.conditional(state.fetch, every=0.01, minimum=0.01, event_type="x"), manager=hub)
        async with tasks:
            await eventually(lambda: tasks.status()[0]["unheard"])
            assert state.fetches == 0
            async with connect(hub.url):
                await eventually(lambda: state.fetches)
    broadcaster = SafeBroadcaster(NOWHERE, tmp_path / "a.db")
    source = sources.conditional(state.fetch, event_type="x")
    with pytest.raises(ConfigError, match="cannot tell who listens"):
        BackgroundTasks(broadcaster).add(source)
    BackgroundTasks(hub).add(source)  # it is still free
    source.state = "stopped"
    await broadcaster.stop(0)


def test_a_source_may_have_a_name() -> None:
    named = [
        sources.poll(State().fetch, event_type="x", name="a"),
        sources.on_event("x", to=Manager(), name="b")(State().fetch).source,
    ]
    assert [source.status()["name"] for source in named] == ["a", "b"]
    named[0].state = "stopped"


@virtual
async def test_the_numbers_of_sources_are_there_for_monitoring() -> None:
    good = [sources.poll(State(n).fetch, event_type="good") for n in range(2)]
    bad = sources.poll(State(object()).fetch, event_type="bad", name="bad one")
    _, tasks = run(*good, bad)
    async with tasks:
        await asyncio.sleep(6)
        numbers = {(metric.name, metric.labels["source"]): metric.value for metric in tasks.metrics()}
    assert numbers == {
        ("source_running", "good (State.fetch)"): 2,
        ("source_events", "good (State.fetch)"): 2,
        ("source_failures", "good (State.fetch)"): 0,
        ("source_running", "bad one"): 1,
        ("source_events", "bad one"): 0,
        ("source_failures", "bad one"): 2,
    }


class Plain:
    """A manager with plain methods."""

    def __init__(self) -> None:
        self.data: list[object] = []

    def broadcast(self, message: dict) -> None:
        self.data.append(message["data"])


class Engine:
    def __init__(self) -> None:
        self.beats = 0

    async def safe_emit(self, _: dict) -> None:
        self.beats += 1


def test_all_of_it_runs_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop", reason="uvloop has no wheel for this Python")

    async def life() -> None:
        state, manager, engine = State("a"), Plain(), Engine()
        tasks = BackgroundTasks(manager)
        queue = tasks.add(sources.hybrid(state.fetch, every=0.01, minimum=0.01, event_type="x"))
        tasks.add(sources.poll(lambda: state.value, every=0.01, minimum=0.01, event_type="y"))
        boot = BootSequence()
        boot.add("sources", tasks, ready=lambda: len(manager.data) == 2)
        boot.add("heartbeat", Heartbeat(engine, "ada", interval=0.01), depends_on=["sources"])
        async with boot:
            await queue.notify("b")
            await eventually(lambda: "b" in manager.data)
            await eventually(lambda: engine.beats > 3)
        assert len(asyncio.all_tasks()) == 1

    uvloop.run(life())
