"""The event bus: who publishes is never harmed, handlers get their events in order, and nothing is unbounded."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from dataclasses import dataclass
from unittest.mock import AsyncMock

import pytest
import uvloop

from safe_broadcaster import BroadcastError, ConfigError, EventBus, QueueFull
from support import eventually, eventually_blocking
from virtual import now, virtual


@dataclass(frozen=True)
class Sample:
    n: int = 0


class SpecialSample(Sample):
    pass


@dataclass(frozen=True)
class Other:
    n: int = 0


class Listener:
    """Keeps what it hears; takes a second for each."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.heard: list[object] = []

    async def on_sample(self, event: Sample) -> None:
        await asyncio.sleep(self.seconds)
        self.heard.append(event)

    async def on_other(self, event: Other) -> None:
        self.heard.append(event)


@virtual
async def test_handlers_get_events_of_their_class_and_of_those_below() -> None:
    bus, samples, everything = EventBus(), Listener(), Listener()
    bus.subscribe(Sample, samples.on_sample)
    bus.subscribe(object, everything.on_other)
    assert await bus.publish(Sample(1)) == 2
    assert await bus.publish(SpecialSample(2)) == 2
    assert await bus.publish(Other(3)) == 1
    assert await bus.drain()
    assert samples.heard == [Sample(1), SpecialSample(2)]
    assert everything.heard == [Sample(1), SpecialSample(2), Other(3)]
    assert bus.get_handler_count(Sample) == bus.get_handler_count(SpecialSample) == 2
    assert (bus.get_handler_count(Other), bus.get_handler_count(int), bus.get_handler_count()) == (1, 1, 2)


@virtual
async def test_a_handler_that_is_reached_by_two_classes_or_subscribed_twice_is_called_once() -> None:
    bus, listener = EventBus(), Listener()
    for event_type in (Sample, Sample, SpecialSample, object):
        bus.subscribe(event_type, listener.on_sample)
    assert await bus.publish(SpecialSample(1)) == 1
    await bus.drain()
    assert listener.heard == [SpecialSample(1)]


@virtual
async def test_publishing_waits_for_no_handler() -> None:
    bus, slow = EventBus(), Listener(1.0)
    bus.subscribe(Sample, slow.on_sample)
    for n in range(3):
        await bus.publish(Sample(n))
    assert now() == 0
    assert bus.get_stats()["pending"] == 3
    await asyncio.sleep(0.1)
    assert len(bus._running_tasks) == 1
    await bus.drain()
    assert (slow.heard, now()) == ([Sample(0), Sample(1), Sample(2)], 3)
    assert bus._running_tasks == set()


@virtual
async def test_the_methods_of_one_object_get_their_events_in_the_order_of_publishing() -> None:
    bus, listener = EventBus(), Listener(1.0)
    bus.subscribe(Sample, listener.on_sample)
    bus.subscribe(Other, listener.on_other)
    events = [Sample(0), Other(1), Sample(2), Other(3)]
    for event in events:
        await bus.publish(event)
    await bus.drain()
    assert listener.heard == events


@virtual
async def test_a_slow_handler_holds_up_no_other() -> None:
    bus, slow, quick = EventBus(), Listener(10.0), Listener()
    bus.subscribe(Sample, slow.on_sample)
    bus.subscribe(Sample, quick.on_sample)
    await bus.publish(Sample(1))
    await bus.publish(Sample(2))
    await asyncio.sleep(1)
    assert quick.heard == [Sample(1), Sample(2)]
    assert slow.heard == []
    await bus.drain()


async def test_a_handler_that_fails_harms_neither_the_publisher_nor_the_others_and_is_named(caplog) -> None:
    bus, listener = EventBus(), Listener()

    async def fails(event: Sample) -> None:
        raise KeyError(event.n)

    def fails_plainly(event: Sample) -> None:
        raise OSError("plain")

    for handler in (fails, fails_plainly, listener.on_sample):
        bus.subscribe(Sample, handler)
    for n in range(2):
        assert await bus.publish(Sample(n)) == 3
    assert await bus.drain(10)
    assert listener.heard == [Sample(0), Sample(1)]
    stats = bus.get_stats()
    assert (stats["handled"], stats["failed"], stats["published"]) == (2, 4, 2)
    told = [record for record in caplog.records if record.name == "safe_broadcaster.bus.event_bus"]
    assert len(told) == 4
    assert {record.handler.rpartition(".")[2] for record in told} == {"fails", "fails_plainly"}
    assert {record.event_type for record in told} == {"Sample"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before Python 3.11 nobody can tell who cancelled a task")
@virtual
async def test_a_handler_that_is_cancelled_from_within_is_an_error_like_others(caplog) -> None:
    bus, heard = EventBus(), []

    async def waits(event: Sample) -> None:
        if event.n == 0:
            task = asyncio.create_task(asyncio.sleep(10))
            task.cancel()
            await task
        heard.append(event.n)

    bus.subscribe(Sample, waits)
    for n in range(2):
        await bus.publish(Sample(n))
    assert await bus.drain()
    assert (heard, bus.get_stats()["failed"]) == ([1], 1)
    assert "was cancelled from within" in caplog.text


@virtual
async def test_a_handler_that_hangs_is_cancelled_and_its_next_event_follows() -> None:
    bus, heard = EventBus(handler_timeout=5.0), []

    async def hangs_once(event: Sample) -> None:
        if event.n == 0:
            await asyncio.get_running_loop().create_future()
        heard.append(event.n)

    bus.subscribe(Sample, hangs_once)
    await bus.publish(Sample(0))
    await bus.publish(Sample(1))
    await bus.drain()
    assert (heard, now(), bus.get_stats()["failed"]) == ([1], 5, 1)


async def test_a_plain_handler_may_block_without_holding_up_the_loop() -> None:
    bus, go, done = EventBus(), threading.Event(), []

    def blocks(event: Sample) -> None:
        go.wait(20)
        done.append(event.n)

    bus.subscribe(Sample, blocks)
    await bus.publish(Sample(1))
    await eventually(lambda: bus._running_tasks)
    go.set()
    assert await bus.drain(10)
    assert done == [1]


@virtual
async def test_what_waits_for_a_handler_is_bounded_and_a_loss_is_told(caplog) -> None:
    caplog.set_level(logging.WARNING)
    bus, slow = EventBus(queue_size=2), Listener(1.0)
    bus.subscribe(Sample, slow.on_sample)
    await bus.publish(Sample(0))
    await asyncio.sleep(0.1)
    for n in range(1, 6):
        await bus.publish(Sample(n))
    assert (bus.get_stats()["pending"], bus.get_stats()["dropped"]) == (3, 3)
    await bus.drain()
    assert slow.heard == [Sample(0), Sample(4), Sample(5)]
    assert "on_sample is full, 2 items wait: dropping (drop_oldest)" in caplog.text
    assert "3 items were dropped" in caplog.text


@virtual
async def test_where_raise_is_chosen_the_publisher_is_told_and_the_others_get_the_event() -> None:
    bus, slow, quick = EventBus(queue_size=1, when_full="raise"), Listener(10.0), Listener()
    bus.subscribe(Sample, slow.on_sample)
    bus.subscribe(Sample, quick.on_sample)
    for n in range(2):
        await bus.publish(Sample(n))
        await asyncio.sleep(0.1)
    with pytest.raises(QueueFull):
        await bus.publish(Sample(2))
    await asyncio.sleep(0.1)
    assert quick.heard == [Sample(0), Sample(1), Sample(2)]
    await bus.stop(0)


@virtual
async def test_where_wait_is_chosen_the_publisher_waits_and_nothing_is_lost() -> None:
    bus, slow = EventBus(queue_size=1, when_full="wait"), Listener(1.0)
    bus.subscribe(Sample, slow.on_sample)
    for n in range(5):
        await bus.publish(Sample(n))
    assert now() == 3
    await bus.drain()
    assert [event.n for event in slow.heard] == list(range(5))


@virtual
async def test_unsubscribed_handlers_hear_no_more_but_what_they_were_promised() -> None:
    bus, listener = EventBus(), Listener()
    unsubscribe = bus.subscribe(Sample, listener.on_sample)
    await bus.publish(Sample(1))
    unsubscribe()
    assert await bus.publish(Sample(2)) == 0
    await asyncio.sleep(1)
    assert listener.heard == [Sample(1)]
    assert bus.get_handler_count(Sample) == 0
    assert bus.unsubscribe(Sample, listener.on_sample) is False
    bus.subscribe(Sample, listener.on_sample)
    await bus.publish(Sample(3))
    await bus.drain()
    assert listener.heard == [Sample(1), Sample(3)]


def test_a_handler_that_was_unsubscribed_in_the_middle_is_waited_for_counted_and_stopped_like_others(caplog) -> None:
    @virtual
    async def main() -> None:
        bus, heard = EventBus(queue_size=2), []

        async def slow(event: int) -> None:
            await asyncio.sleep(1)
            heard.append(event)

        end = bus.subscribe(int, slow)
        for n in range(4):
            await bus.publish(n)
        end()
        stats = bus.get_stats()
        assert (stats["handlers"], stats["pending"], stats["dropped"]) == (0, 2, 2)
        assert await bus.drain()
        assert heard == [2, 3]
        assert (bus.get_stats()["dropped"], bus._inboxes()) == (2, [])

        end = bus.subscribe(int, slow)
        await bus.publish(4)
        await asyncio.sleep(0.5)
        end()
        bus.subscribe(int, slow)
        await bus.publish(5)
        await bus.drain()
        assert (heard, now()) == ([2, 3, 4, 5], 4), "it is still never called twice at once"

        await bus.publish(6)
        bus.unsubscribe(int, slow)
        await bus.stop(drain_timeout=0.1)
        await asyncio.sleep(2)
        assert heard == [2, 3, 4, 5]

    main()
    assert "slow was not done with 1 events when the bus stopped" in caplog.text


@virtual
async def test_stop_lets_handlers_finish_cancels_the_rest_and_tells_how_much_that_was(caplog) -> None:
    async with EventBus() as bus:
        slow = Listener(0.9)
        bus.subscribe(Sample, slow.on_sample)
        for n in range(10):
            await bus.publish(Sample(n))
    assert len(slow.heard) == 5
    assert "was not done with 5 events when the bus stopped" in caplog.text
    await bus.publish(Sample(10))
    await bus.drain()
    assert slow.heard[-1] == Sample(10), "it may be used again"


@virtual
async def test_a_handler_cannot_wait_for_its_own_end() -> None:
    bus, caught = EventBus(), []

    async def waits(_: Sample) -> None:
        try:
            await bus.drain()
        except BroadcastError as error:
            caught.append(error)

    bus.subscribe(Sample, waits)
    await bus.publish(Sample())
    await bus.drain()
    assert len(caught) == 1


@virtual
async def test_handlers_may_publish() -> None:
    bus, listener = EventBus(), Listener()

    async def on_sample(event: Sample) -> None:
        await bus.publish(Other(event.n))

    bus.subscribe(Sample, on_sample)
    bus.subscribe(Other, listener.on_other)
    await bus.publish(Sample(7))
    while bus.get_stats()["pending"]:
        await asyncio.sleep(0.1)
    assert listener.heard == [Other(7)]


async def test_mocks_are_handlers() -> None:
    bus, mock = EventBus(), AsyncMock()
    bus.subscribe(Sample, mock)
    await bus.publish(Sample(1))
    await bus.drain()
    mock.assert_awaited_once_with(Sample(1))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_handlers_run_on_the_loop_that_subscribed_them_whoever_publishes(new_loop) -> None:
    bus, ran_on = EventBus(), []
    home, stop = new_loop(), threading.Event()

    async def on_sample(event: Sample) -> None:
        ran_on.append((asyncio.get_running_loop(), event.n))

    async def live() -> None:
        bus.subscribe(Sample, on_sample)
        await asyncio.to_thread(stop.wait, 20)

    thread = threading.Thread(target=home.run_until_complete, args=(live(),))
    thread.start()
    try:
        eventually_blocking(lambda: bus.get_handler_count() == 1)
        asyncio.run(bus.publish(Sample(0)))  # another loop
        bus.publish_nowait(Sample(1))  # none
        eventually_blocking(lambda: len(ran_on) == 2)
    finally:
        stop.set()
        thread.join(20)
        home.run_until_complete(home.shutdown_default_executor())
        home.close()
    assert ran_on == [(home, 0), (home, 1)]


def test_subscribed_without_a_loop_they_run_on_the_publishers_and_on_the_next_when_that_is_closed() -> None:
    bus, listener = EventBus(), Listener()
    bus.subscribe(Sample, listener.on_sample)

    async def publish(n: int) -> None:
        await bus.publish(Sample(n))
        assert await bus.drain(10)

    with pytest.raises(BroadcastError, match="no event loop"):
        bus.publish_nowait(Sample(9))
    asyncio.run(publish(0))
    asyncio.run(publish(1))
    assert listener.heard == [Sample(0), Sample(1)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((7, print), "event_type=7"), ((Sample, 7), "handler=7"), (("Sample", print), "event_type=")],
)
def test_a_wrong_subscription_is_named(arguments, named) -> None:
    with pytest.raises(ConfigError, match=f"{named}.* is not allowed"):
        EventBus().subscribe(*arguments)


@pytest.mark.parametrize("wrong", [{"queue_size": 0}, {"when_full": "never"}, {"handler_timeout": 0}])
def test_a_wrong_setting_is_named(wrong) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        EventBus(**wrong)
