"""A queue before emitters: nobody waits for them, one that fails holds up no other, and a loss is told."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
import threading

import pytest
import uvloop

from safe_broadcaster import (
    BroadcasterClosed,
    CircuitBreakers,
    ConfigError,
    EmitterQueue,
    EventBroadcaster,
    QueueFull,
)
from support import eventually
from virtual import now, virtual


class Emitter:
    """Keeps what it emits, with the time; fails as often as it is told."""

    def __init__(self, *, failures: int = 0, error: Exception | None = None, seconds: float = 0.0) -> None:
        self.failures = failures
        self.error = error or OSError("down")
        self.seconds = seconds
        self.events: list[object] = []
        self.tries: list[float] = []

    async def __call__(self, event: object) -> None:
        self.tries.append(now())
        await asyncio.sleep(self.seconds)
        if self.failures:
            self.failures -= 1
            raise self.error
        self.events.append(event)


def queue(emitter, *arguments, **settings) -> EmitterQueue:
    """A queue whose breakers live in virtual time too."""
    breakers = CircuitBreakers(clock=asyncio.get_running_loop().time)
    return EmitterQueue(emitter, *arguments, breakers=breakers, **settings)


def numbers_of(emitter_queue: EmitterQueue, *names: str) -> tuple:
    (stats,) = emitter_queue.get_stats()["emitters"].values()
    return tuple(stats[name] for name in names)


@virtual
async def test_events_are_emitted_in_order_and_whoever_puts_never_waits() -> None:
    emitter = Emitter(seconds=1.0)
    async with queue(emitter) as events:
        assert [events.put_nowait(n) for n in range(3)] == [True] * 3
        assert await events.put(3) is True
        assert (now(), events.qsize(), len(events)) == (0, 4, 4)
        assert await events.drain()
        assert (emitter.events, now(), events.qsize()) == ([0, 1, 2, 3], 4, 0)
    assert numbers_of(events, "emitted", "errors", "dropped") == (4, 0, 0)
    with pytest.raises(BroadcasterClosed):
        events.put_nowait(4)


@virtual
async def test_several_emitters_get_everything_and_none_waits_for_another() -> None:
    redis, websocket = Emitter(), Emitter(failures=1000)
    events = queue({"redis": redis, "websocket": websocket})
    for n in range(10):
        await events.put(n)
    await asyncio.sleep(1)
    assert redis.events == list(range(10))
    stats = events.get_stats()
    assert (stats["event_queue_size"], stats["emitters"]["redis"]["queue_size"]) == (10, 0)
    websocket.failures = 0
    assert await events.drain(100)
    assert websocket.events == list(range(10))
    assert list(stats["emitters"]) == list(events.breakers) == ["redis", "websocket"]


@virtual
async def test_what_fails_is_tried_again_and_after_five_errors_the_service_is_left_alone_for_a_minute(caplog) -> None:
    emitter = Emitter(failures=7)
    events = queue(emitter)
    events.put_nowait("a")
    events.put_nowait("b")
    assert await events.drain()
    assert emitter.events == ["a", "b"], "in order, and nothing was lost"
    tries = emitter.tries
    for attempt, least in enumerate([1, 2, 4, 8]):
        assert 1.1 * least <= tries[attempt + 1] - tries[attempt] <= 1.3 * least
    assert tries[5] - tries[4] == pytest.approx(60, abs=1)
    assert tries[6] - tries[5] == pytest.approx(60, abs=1), "the first try after the minute failed"
    assert events.breakers["Emitter"].tripped is False
    assert "is left alone for" in caplog.text
    assert numbers_of(events, "errors", "emitted", "failed") == (7, 2, 0)


@virtual
async def test_a_breaker_that_is_reset_by_hand_lets_it_go_on_at_once() -> None:
    emitter = Emitter(failures=5)
    events = queue({"redis": emitter})
    events.put_nowait(1)
    while not events.breakers["redis"].tripped:
        await asyncio.sleep(1)
    await asyncio.sleep(20)  # the pause of the fifth failure
    began = now()
    events.breakers["redis"].reset()
    await events.drain()
    assert now() - began <= 2


@virtual
async def test_an_event_that_can_never_be_emitted_is_given_up_and_the_others_follow(caplog) -> None:
    async def emit(event: object) -> None:
        if event == "bad":
            raise TypeError("Object of type set is not JSON serializable")
        emitted.append(event)

    emitted: list[object] = []
    events = queue(emit)
    for event in ("a", "bad", "bad", "bad", "bad", "bad", "bad", "b"):
        events.put_nowait(event)
    await events.drain()
    assert (emitted, now()) == (["a", "b"], 0)
    assert numbers_of(events, "failed", "emitted") == (6, 2)
    assert "are given up: TypeError: Object of type set" in caplog.text
    assert not any(breaker.tripped for breaker in events.breakers.values()), "the service is not at fault"


@virtual
async def test_an_answer_that_cannot_be_read_is_the_services_fault() -> None:
    answers = [b"<html>502</html>", b"\xff", b"{}"]

    async def emit(_: object) -> None:
        json.loads(answers.pop(0).decode())

    async with EmitterQueue(emit) as queue:
        queue.put_nowait({"n": 1})
        assert await queue.drain(10)
    [stats] = queue.get_stats()["emitters"].values()
    assert (stats["emitted"], stats["failed"], stats["errors"]) == (1, 0, 2)


@virtual
async def test_a_certificate_that_is_refused_is_the_services_fault() -> None:
    emitter = Emitter(failures=1, error=ssl.SSLCertVerificationError("expired"))
    events = queue(emitter)
    events.put_nowait(1)
    await events.drain()
    assert emitter.events == [1]


@virtual
async def test_batches_are_lists_and_one_bad_event_costs_only_itself() -> None:
    async def emit(batch: list[object]) -> None:
        batches.append(batch)
        if "bad" in batch:
            raise ValueError("no")

    batches: list[list[object]] = []
    events = queue(emit, batch_size=3, batch_delay=0.5)
    for event in ("a", "bad", "b", "c"):
        events.put_nowait(event)
    await events.drain()
    assert batches == [["a", "bad", "b"], ["a"], ["bad"], ["b"], ["c"]]
    assert numbers_of(events, "emitted", "failed") == (3, 1)
    assert now() == 0.5, "the last one waited for company"


@virtual
async def test_an_emitter_that_hangs_is_cancelled_and_tried_again() -> None:
    calls = []

    async def hangs_once(event: object) -> None:
        calls.append(event)
        if len(calls) == 1:
            await asyncio.get_running_loop().create_future()

    events = queue(hangs_once, timeout=5.0)
    events.put_nowait(1)
    await events.drain()
    assert calls == [1, 1]
    assert 6 <= now() <= 6.4


@virtual
async def test_given_a_number_of_attempts_it_gives_up_and_says_so(caplog) -> None:
    emitter = Emitter(failures=3)
    events = queue(emitter, max_attempts=3)
    events.put_nowait("a")
    events.put_nowait("b")
    await events.drain()
    assert emitter.events == ["b"]
    assert numbers_of(events, "failed", "emitted", "last_error") == (1, 1, "OSError: down")
    assert "1 events could not be emitted" in caplog.text


@virtual
async def test_at_the_bound_the_oldest_go_unless_something_else_is_chosen(caplog) -> None:
    emitter = Emitter(seconds=1.0)
    events = queue(emitter, 2)
    events.put_nowait(0)
    await asyncio.sleep(0.1)
    for n in range(1, 6):
        assert events.put_nowait(n) is True
    await events.drain()
    assert emitter.events == [0, 4, 5]
    assert numbers_of(events, "dropped") == (3,)
    assert "is full, 2 items wait: dropping (drop_oldest)" in caplog.text


@virtual
async def test_the_newest_go_where_that_is_chosen() -> None:
    emitter = Emitter(seconds=1.0)
    events = queue(emitter, 1, when_full="drop_newest")
    events.put_nowait(0)
    await asyncio.sleep(0.1)
    assert [events.put_nowait(n) for n in (1, 2)] == [True, False]
    await events.drain()
    assert emitter.events == [0, 1]


@virtual
async def test_whoever_puts_waits_where_that_is_chosen_and_nothing_is_lost() -> None:
    emitter = Emitter(seconds=1.0)
    events = queue(emitter, 1, when_full="wait")
    await events.put(0)
    await asyncio.sleep(0.1)
    await events.put(1)
    with pytest.raises(QueueFull):
        events.put_nowait(9)
    assert now() == 0.1
    await events.put(2)
    assert now() == pytest.approx(1.0)
    await events.drain()
    assert emitter.events == [0, 1, 2]


@virtual
async def test_where_refusing_is_chosen_all_emitters_get_an_event_or_none() -> None:
    slow, quick = Emitter(seconds=1.0), Emitter()
    events = queue({"slow": slow, "quick": quick}, 1, when_full="raise")
    for n in range(2):
        events.put_nowait(n)
        await asyncio.sleep(0.1)
    with pytest.raises(QueueFull, match="queue of emitter slow is full: 1 events wait"):
        await events.put(2)
    await events.drain()
    assert slow.events == quick.events == [0, 1]


@virtual
async def test_stopping_emits_for_a_while_and_tells_what_is_lost(caplog) -> None:
    emitter = Emitter(seconds=1.0)
    events = queue(emitter)
    for n in range(5):
        events.put_nowait(n)
    assert await events.stop(2.5) == 3
    assert emitter.events == [0, 1]
    assert numbers_of(events, "abandoned") == (3,)
    assert re.search(r"3 events were not emitted to .* before the stop and are lost", caplog.text)


@virtual
async def test_latency_and_the_last_emission_are_told() -> None:
    emitter = Emitter()
    async with queue(emitter) as events:
        assert events.get_stats()["last_emission"] is None
        events.put_nowait(1)
        await events.drain()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", events.get_stats()["last_emission"])
        mean, most = numbers_of(events, "latency_mean", "latency_max")
        assert 0 < mean <= most < 1


async def test_plain_functions_emit_from_a_thread_without_holding_up_the_loop() -> None:
    emitted: list[object] = []
    async with EmitterQueue(emitted.append) as events:
        for n in range(10):
            events.put_nowait(n)
        assert await events.drain(10)
    assert emitted == list(range(10))


async def test_a_safe_broadcaster_and_a_hub_are_emitters(make) -> None:
    async with EventBroadcaster(port=0) as hub:
        broadcaster = make(hub.client)
        await broadcaster.start()
        async with EmitterQueue({"spilled": broadcaster.safe_emit, "direct": hub.broadcast_event}) as events:
            events.put_nowait({"type": "novelty", "content": {"n": 1}})
            assert await events.drain(10)
        await eventually(lambda: hub.get_stats()["events"] == 2)


@virtual
async def test_two_functions_of_one_name_are_told_apart() -> None:
    first, second = [], []

    def make(into):
        async def emit(event: object) -> None:
            into.append(event)

        return emit

    events = queue([make(first), make(second)])
    events.put_nowait(1)
    await events.drain()
    assert (first, second) == ([1], [1])
    assert len(events.get_stats()["emitters"]) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"event_emitter": []},
        {"event_emitter": 7},
        {"event_emitter": {"a": 7}},
        {"event_emitter": None},
        {"maxsize": 0},
        {"when_full": "x"},
        {"batch": {"batch_size": 0}},
        {"linger": {"batch_delay": -1}},
        {"timeout": 0},
        {"max_attempts": 0},
        {"base_delay": 0},
        {"base_delay": 31.0},
        {"max_delay": "30"},
        {"max_attempts": "3"},
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(wrong, caplog) -> None:
    caplog.set_level(logging.ERROR)
    ((name, value),) = wrong.items()
    settings = value if name in {"batch", "linger"} else wrong
    with pytest.raises(ConfigError, match=rf"{name}=.* is not allowed"):
        EmitterQueue(**{"event_emitter": print, **settings})


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_several_loops_have_a_queue_each_and_threads_put_into_both(new_loop) -> None:
    def run(loop: asyncio.AbstractEventLoop, into: list[object]) -> None:
        failing = True

        async def emit(event: object) -> None:
            nonlocal failing
            await asyncio.sleep(0)
            if failing:
                failing = False
                raise OSError("once")
            into.append(event)

        async def main() -> None:
            async with EmitterQueue(emit, maxsize=10_000, base_delay=0.01, timeout=5.0) as events:
                events.put_nowait(-1)
                await asyncio.to_thread(lambda: [events.put_nowait(n) for n in range(1000)])
                assert await events.drain(20)
            await asyncio.get_running_loop().shutdown_default_executor()

        try:
            loop.run_until_complete(main())
        finally:
            loop.close()

    emitted: tuple[list[object], list[object]] = ([], [])
    threads = [threading.Thread(target=run, args=(new_loop(), into)) for into in emitted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert emitted == (list(range(-1, 1000)),) * 2
