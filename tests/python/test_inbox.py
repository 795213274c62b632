"""A queue with one consumer: in order, bounded, from any thread, and with no task while it is empty."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading

import pytest
import uvloop

from safe_broadcaster import BroadcasterClosed, BroadcastError, ConfigError, QueueFull
from safe_broadcaster.inbox import Inbox
from support import eventually
from virtual import now, virtual


class Slow:
    """Takes a second for each batch, and keeps it with the time."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.batches: list[list[int]] = []
        self.times: list[float] = []

    async def __call__(self, items: list[int]) -> None:
        self.times.append(now())
        self.batches.append(items)
        await asyncio.sleep(self.seconds)

    @property
    def items(self) -> list[int]:
        return [item for batch in self.batches for item in batch]


@virtual
async def test_items_are_consumed_in_order_and_the_task_ends_with_them() -> None:
    consumer = Slow()
    inbox = Inbox(consumer, maxsize=10, name="test")
    for n in range(5):
        assert inbox.put_nowait(n)
    assert len(inbox) == 5
    await asyncio.sleep(0.5)
    assert (len(inbox), inbox.waiting) == (5, 4), "one is being consumed"
    assert await inbox.drain() is True
    assert (consumer.items, now(), len(inbox), inbox.task) == ([0, 1, 2, 3, 4], 5, 0, None)
    await inbox.put(5)
    assert await inbox.drain()
    assert consumer.items[-1] == 5


@virtual
async def test_what_the_consumer_raises_is_logged_and_the_next_follow(caplog) -> None:
    seen = []

    async def fails(items: list[int]) -> None:
        seen.extend(items)
        raise OSError("no")

    inbox = Inbox(fails, maxsize=10, name="test")
    inbox.put_nowait(1)
    inbox.put_nowait(2)
    await inbox.drain()
    assert seen == [1, 2]
    assert caplog.text.count("OSError: no") == 2


POLICIES = [("drop_oldest", [0, 3, 4]), ("drop_newest", [0, 1, 2])]


@pytest.mark.parametrize(("policy", "left"), POLICIES)
def test_at_the_bound_the_policy_decides_and_it_is_told(policy, left, caplog) -> None:
    @virtual
    async def main() -> None:
        consumer, dropped = Slow(), []
        inbox = Inbox(consumer, maxsize=2, when_full=policy, name="test", on_drop=dropped.append)
        inbox.put_nowait(0)
        await asyncio.sleep(0.1)
        taken = [inbox.put_nowait(n) for n in range(1, 5)]
        assert taken == [True, True, policy == "drop_oldest", policy == "drop_oldest"]
        await inbox.drain()
        assert consumer.items == left
        assert sorted(consumer.items + dropped) == [0, 1, 2, 3, 4]
        assert inbox.dropped == 2

    caplog.set_level(logging.WARNING)
    main()
    assert [record.message for record in caplog.records] == [
        f"test is full, 2 items wait: dropping ({policy})",
        "test has room again: 2 items were dropped",
    ]


def test_a_bound_that_is_reached_for_long_is_told_again_and_again_and_never_often(caplog) -> None:
    @virtual
    async def main() -> None:
        inbox = Inbox(Slow(), maxsize=1, name="test")
        for n in range(1 + 12_345):
            inbox.put_nowait(n)
        await inbox.drain()

    main()
    numbers = [record.args[1] for record in caplog.records]
    assert numbers == [1, 10, 100, 1000, 10_000, 12_345]


@virtual
async def test_equal_items_are_not_taken_for_each_other_when_the_oldest_goes() -> None:
    consumer = Slow()
    inbox = Inbox(consumer, maxsize=1, name="test")
    assert [inbox.put_nowait(7) for _ in range(3)] == [True] * 3
    await inbox.drain()
    assert (consumer.items, inbox.dropped) == ([7], 2)


@virtual
async def test_raise_refuses_and_takes_nothing() -> None:
    consumer = Slow()
    inbox = Inbox(consumer, maxsize=1, when_full="raise", name="test")
    inbox.put_nowait(0)
    with pytest.raises(QueueFull, match="test is full: 1 items wait"):
        inbox.put_nowait(1)
    await inbox.drain()
    assert consumer.items == [0]


@virtual
async def test_wait_holds_up_whoever_puts_and_keeps_the_order() -> None:
    consumer = Slow()
    inbox = Inbox(consumer, maxsize=1, when_full="wait", name="test")
    puts = [asyncio.create_task(inbox.put(n)) for n in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        inbox.put_nowait(9)
    await asyncio.wait(puts)
    await inbox.drain()
    assert (consumer.items, now()) == ([0, 1, 2, 3], 4)


@virtual
async def test_a_place_that_was_waited_for_is_not_taken_by_a_thread_in_the_last_moment() -> None:
    inbox = Inbox(Slow(), maxsize=1, when_full="wait", name="test")

    class Lock:
        """Lets another thread in when it is given free."""

        lock = threading.Lock()
        refused = 0

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            inbox._lock = self.lock
            try:
                inbox.put_nowait("another's")
            except QueueFull:
                self.refused += 1

    inbox._lock = meddling = Lock()
    assert await inbox.put("mine")
    assert meddling.refused == 1
    assert await inbox.drain()


@virtual
async def test_waiting_for_the_end_is_waiting_for_what_was_put_before() -> None:
    inbox = Inbox(Slow(), maxsize=10, name="test")

    async def load() -> None:
        while True:
            inbox.put_nowait(1)
            await asyncio.sleep(0.9)

    loading = asyncio.create_task(load())
    await asyncio.sleep(50)
    assert len(inbox) > 1
    assert await asyncio.wait_for(inbox.drain(), 100), "although there is always something"
    for _ in range(3):
        assert not await inbox.drain(0.01)
    giving_up = asyncio.create_task(inbox.drain())
    await asyncio.sleep(0)
    giving_up.cancel()
    await asyncio.wait({giving_up})
    assert not inbox._waiting_for_end, "who gave up is forgotten"
    loading.cancel()
    assert await inbox.drain()


@virtual
async def test_a_cancelled_wait_passes_its_place_on() -> None:
    consumer = Slow()
    inbox = Inbox(consumer, maxsize=1, when_full="wait", name="test")
    await inbox.put(0)
    waiting = [asyncio.create_task(inbox.put(n)) for n in (1, 2, 3)]
    await asyncio.sleep(0.5)
    waiting[0].cancel()
    waiting[1].cancel()
    await asyncio.wait(waiting)
    await inbox.drain()
    assert consumer.items[0] == 0
    assert consumer.items[-1] == 3


@virtual
async def test_batches_wait_for_company_but_not_longer_than_they_may() -> None:
    consumer = Slow(0)
    inbox = Inbox(consumer, maxsize=100, name="test", batch=3, linger=1.0)
    inbox.put_nowait(0)
    inbox.put_nowait(1)
    await asyncio.sleep(5)
    assert (consumer.batches, consumer.times) == ([[0, 1]], [1.0])
    for n in range(2, 6):
        inbox.put_nowait(n)
        await asyncio.sleep(0.1)
    await inbox.drain()
    assert consumer.batches[1:] == [[2, 3, 4], [5]]
    assert consumer.times[1] == pytest.approx(5.2), "a full one leaves at once"


@virtual
async def test_company_that_finds_no_room_is_not_waited_for() -> None:
    consumer = Slow(0)
    inbox = Inbox(consumer, maxsize=2, when_full="raise", name="test", batch=100, linger=60)
    inbox.put_nowait(0)
    await asyncio.sleep(0)
    inbox.put_nowait(1)
    await inbox.drain()
    assert now() == 0


@virtual
async def test_closing_takes_no_more_waits_and_tells_what_is_left() -> None:
    consumer = Slow()
    inbox = Inbox(consumer, maxsize=10, name="test")
    for n in range(5):
        inbox.put_nowait(n)
    assert await inbox.close(2.5) == 3
    assert consumer.items == [0, 1, 2]
    with pytest.raises(BroadcasterClosed, match="test was stopped"):
        inbox.put_nowait(9)


@virtual
async def test_closing_wakes_those_that_wait_for_room() -> None:
    inbox = Inbox(Slow(), maxsize=1, when_full="wait", name="test")
    await inbox.put(0)
    waiting = asyncio.create_task(inbox.put(1))
    await asyncio.sleep(0)
    await inbox.close()
    with pytest.raises(BroadcasterClosed):
        await waiting


@virtual
async def test_a_consumer_that_ignores_its_cancellation_is_told_and_not_waited_for(caplog) -> None:
    async def stubborn(_: list[int]) -> None:
        for _ in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)

    inbox = Inbox(stubborn, maxsize=1, name="test")
    inbox.put_nowait(0)
    await asyncio.sleep(1)
    task = inbox.task
    assert await inbox.close() == 1
    assert now() == 2
    assert "does not let itself be cancelled" in caplog.text
    await task


@virtual
async def test_whoever_consumes_cannot_wait_for_itself() -> None:
    caught = []

    async def waits(_: list[int]) -> None:
        try:
            await inbox.drain()
        except BroadcastError as error:
            caught.append(str(error))

    inbox = Inbox(waits, maxsize=1, name="test")
    inbox.put_nowait(0)
    await inbox.drain()
    assert "cannot wait for the end" in caught[0]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_threads_may_put_and_all_of_it_is_consumed_on_the_loop(new_loop) -> None:
    seen: list[tuple[int, int]] = []
    threads_seen = set()

    async def consume(items: list[tuple[int, int]]) -> None:
        threads_seen.add(threading.get_ident())
        seen.extend(items)

    async def main() -> None:
        inbox: Inbox[tuple[int, int]] = Inbox(consume, maxsize=100_000, name="test", batch=7)

        def put(thread: int) -> None:
            for n in range(2000):
                inbox.put_nowait((thread, n))

        await asyncio.gather(*(asyncio.to_thread(put, thread) for thread in range(4)))
        assert await inbox.drain(20)

    loop = new_loop()
    try:
        loop.run_until_complete(main())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
    assert threads_seen == {threading.get_ident()}
    for thread in range(4):
        assert [n for who, n in seen if who == thread] == list(range(2000))


def test_without_a_loop_it_says_what_to_do_and_with_a_new_one_it_goes_on() -> None:
    seen = []

    async def consume(items: list[int]) -> None:
        seen.extend(items)

    inbox = Inbox(consume, maxsize=10, name="test")
    with pytest.raises(BroadcastError, match="test has no event loop to run on: use it on a loop first"):
        inbox.put_nowait(0)

    async def main(n: int) -> None:
        inbox.put_nowait(n)
        await inbox.drain()

    for n in range(3):
        asyncio.run(main(n))
    assert seen == [0, 1, 2]


def test_a_loop_that_ends_under_it_is_told_and_the_rest_is_consumed_on_the_next(caplog) -> None:
    seen = []

    async def consume(items: list[int]) -> None:
        await asyncio.sleep(0.001)
        seen.extend(items)

    inbox = Inbox(consume, maxsize=10, name="test")

    async def abrupt() -> None:
        inbox.put_nowait(0)
        inbox.put_nowait(1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(abrupt())
    assert "test was cancelled while 2 items were not done with" in caplog.text

    async def again() -> None:
        inbox.put_nowait(2)
        assert await inbox.drain(10)

    asyncio.run(again())
    assert seen == [1, 2], "the first was in the hands of a consumer that was cancelled"


async def test_a_flood_that_never_waits_lets_others_run() -> None:
    turns = 0

    async def consume(_: list[int]) -> None:
        if inbox.waiting < 500:
            inbox.put_nowait(0)

    async def other() -> None:
        nonlocal turns
        while turns < 10:
            turns += 1
            await asyncio.sleep(0)

    inbox = Inbox(consume, maxsize=1000, name="test")
    inbox.put_nowait(0)
    await asyncio.wait_for(other(), 10)
    await inbox.close()


async def test_many_publishers_and_a_small_bound_lose_nothing() -> None:
    seen = []

    async def consume(items: list[int]) -> None:
        seen.extend(items)
        if len(seen) % 3 == 0:
            await asyncio.sleep(0)

    inbox = Inbox(consume, maxsize=2, when_full="wait", name="test")

    async def publish(who: int) -> None:
        for n in range(100):
            await inbox.put(who * 1000 + n)

    await asyncio.wait_for(asyncio.gather(*(publish(who) for who in range(10))), 20)
    await eventually(lambda: not inbox)
    assert sorted(seen) == sorted(who * 1000 + n for who in range(10) for n in range(100))
    for who in range(10):
        mine = [n for n in seen if n // 1000 == who]
        assert mine == sorted(mine)


@pytest.mark.parametrize(
    "wrong", [{"maxsize": 0}, {"maxsize": True}, {"maxsize": 1.5}, {"when_full": "drop"}, {"batch": 0}, {"linger": -1}]
)
def test_a_wrong_setting_is_named(wrong) -> None:
    async def consume(_: list[int]) -> None: ...

    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}=.* is not allowed"):
        Inbox(consume, **{"maxsize": 1, "name": "test", **wrong})


def test_eager_tasks_change_nothing() -> None:
    factory = getattr(asyncio, "eager_task_factory", None)
    if factory is None:
        pytest.skip("eager tasks are new in Python 3.12")
    seen = []

    async def consume(items: list[int]) -> None:
        seen.extend(items)
        if len(seen) % 2:
            await asyncio.sleep(0)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        inbox = Inbox(consume, maxsize=10, name="test")
        for n in range(5):
            inbox.put_nowait(n)
            inbox.put_nowait(n)
            assert await inbox.drain(10)

    asyncio.run(main())
    assert seen == [n for n in range(5) for _ in range(2)]
