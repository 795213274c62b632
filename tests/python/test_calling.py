"""Functions of users are called safely: plain or async, hanging, blocking, cancelling themselves."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import ConfigError, HandlerTimeout, SafeBroadcaster, calling
from safe_broadcaster.calling import call
from safe_broadcaster.checks import check_callable, check_timeout
from support import NOWHERE, eventually
from virtual import now, virtual

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def twice(n: int) -> int:
    await asyncio.sleep(0)
    return 2 * n


def makes_one(n: int) -> Coroutine[Any, Any, int]:
    return twice(n)


class Callable:
    async def __call__(self, n: int) -> int:
        return await twice(n)

    @staticmethod
    def plain(n: int) -> int:
        return 2 * n


@pytest.mark.parametrize(
    "function",
    [twice, Callable(), Callable.plain, functools.partial(twice), makes_one, lambda n: 2 * n],
    ids=["async", "async __call__", "plain", "partial", "plain that makes a coroutine", "lambda"],
)
async def test_any_kind_of_function_is_called_and_its_result_returned(function) -> None:
    assert await call(function, 21) == 42
    assert await call(function, 21, timeout=10) == 42


async def test_a_plain_function_runs_in_a_thread_and_an_async_one_on_the_loop() -> None:
    async def here() -> threading.Thread:
        return threading.current_thread()

    assert await call(threading.current_thread) is not threading.main_thread()
    assert await call(here) is threading.main_thread()


async def test_an_emitters_own_method_needs_no_thread(make) -> None:
    broadcaster: SafeBroadcaster = make(NOWHERE)
    before = threading.enumerate()
    assert await call(broadcaster.safe_emit, {"type": "a"}) is False
    assert set(threading.enumerate()) <= set(before)  # one of an earlier test may have ended
    assert broadcaster.get_stats()["last_seq"] == 1


@virtual
async def test_what_hangs_is_cancelled_after_its_time() -> None:
    ended = []

    async def hangs() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(now())

    with pytest.raises(HandlerTimeout, match=r"hangs did not return within 5 s"):
        await call(hangs, timeout=5)
    assert ended == [5]
    await asyncio.sleep(10)  # the caller's own task is not cancelled any more
    assert getattr(asyncio.current_task(), "cancelling", int)() == 0


@virtual
async def test_the_callers_cancellation_is_no_timeout() -> None:
    task = asyncio.create_task(call(asyncio.sleep, 1000, timeout=5))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@virtual
async def test_its_own_errors_come_through_whatever_they_are() -> None:
    async def fails(error: BaseException) -> None:
        await asyncio.sleep(1)
        raise error

    for error in (ValueError("v"), asyncio.TimeoutError("t")):
        with pytest.raises(type(error)) as caught:
            await call(fails, error, timeout=5)
        assert caught.value is error


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before Python 3.11 nobody can tell who cancelled a task")
@pytest.mark.parametrize("error", [asyncio.CancelledError(), StopIteration(), SystemExit(3)], ids=repr)
async def test_what_would_end_the_caller_is_an_error_like_others(error) -> None:
    async def waits() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    def plain() -> None:
        raise error

    with pytest.raises(RuntimeError, match="waits was cancelled from within"):
        await call(waits, timeout=5)
    with pytest.raises(RuntimeError, match="it raised"):
        await call(plain)


@virtual
async def test_futures_and_other_awaitables_are_awaited() -> None:
    class Other:
        def __await__(self):
            yield from asyncio.sleep(1).__await__()
            return 7

    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(1, future.set_result, 5)

    async def give(what):
        return await what

    assert await call(give, future, timeout=5) == 5
    assert await call(functools.partial(give, Other()), timeout=5) == 7


@virtual
async def test_a_timeout_that_is_swallowed_leaves_no_trace_in_the_callers_task() -> None:
    async def swallows() -> str:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            return "swallowed"
        return "slept"

    async def fails() -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            raise ValueError("instead") from None

    assert await call(swallows, timeout=5) == "swallowed"
    with pytest.raises(ValueError, match="instead"):
        await call(fails, timeout=5)
    assert getattr(asyncio.current_task(), "cancelling", int)() == 0


async def test_a_plain_function_that_hangs_is_not_waited_for_if_it_is_called_once(monkeypatch, caplog) -> None:
    go = threading.Event()
    for _ in range(2):
        with pytest.raises(HandlerTimeout, match=r"wait did not return within 0.01 s; its thread is left to itself"):
            await call(go.wait, 20, timeout=0.01)
    monkeypatch.setattr(calling, "MOST_HANGING", 2)
    task = asyncio.create_task(call(go.wait, 20, timeout=0.01))
    await eventually(lambda: "still runs in its thread after 0.01 s; it is waited for" in caplog.text)
    go.set()
    assert await task is True, "where many hang, it is"
    await eventually(lambda: not any(each.is_running() for each in calling._hanging))


async def test_a_plain_handler_that_hangs_is_told_and_waited_for(caplog) -> None:
    go = threading.Event()
    task = asyncio.create_task(calling.Handler(go.wait, 0.01)(20))
    await eventually(lambda: "still runs in its thread after 0.01 s" in caplog.text)
    assert not task.done()
    go.set()
    assert await task is True


async def test_whoever_waits_for_a_thread_may_be_cancelled_and_what_it_raises_later_is_told(caplog) -> None:
    began, go = threading.Event(), threading.Event()

    def fails_late() -> None:
        began.set()
        go.wait(20)
        raise OSError("late")

    task = asyncio.create_task(call(fails_late))
    await eventually(began.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await eventually(lambda: "OSError('late')" in caplog.text)


async def test_whoever_blocks_the_loop_is_named(caplog) -> None:
    async def blocks() -> None:
        time.sleep(0.26)  # noqa: ASYNC251 - the mistake that is to be told

    async def behaves() -> None:
        await asyncio.sleep(0.26)

    caplog.set_level(logging.WARNING)
    await call(behaves)
    assert caplog.text == ""
    await call(blocks)
    assert "blocks held up the event loop for 0." in caplog.text
    assert caplog.records[0].name == "safe_broadcaster.calling"


def test_closing_a_call_closes_what_it_awaits() -> None:
    closed = []

    async def waits() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            closed.append(True)

    async def main() -> None:
        coroutine = call(waits)
        coroutine.send(None)
        coroutine.close()

    asyncio.run(main())
    assert closed == [True]


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), "1"])
def test_a_wrong_time_is_named(wrong) -> None:
    with pytest.raises(ConfigError, match="handler_timeout="):
        check_timeout("handler_timeout", wrong)


def test_what_cannot_be_called_is_named() -> None:
    with pytest.raises(ConfigError, match="emitter=7 is not allowed"):
        check_callable("emitter", 7)
