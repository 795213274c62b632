"""Users' functions are waited for no longer than they may take, and no cancellation gets lost on the way."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from safe_broadcaster import Aggregator, ConnectionManager, Heartbeat
from safe_broadcaster.deadlines import Aside, TimedOut, within
from safe_broadcaster.mailbox import Mailbox
from safe_broadcaster.sources.source import pause
from support import eventually
from virtual import now, virtual


async def test_a_plain_function_may_be_called_again_as_soon_as_its_result_is_there() -> None:
    calls: list[int] = []
    aside = Aside(lambda: calls.append(1), "test")
    for _ in range(1000):
        await aside()
    assert len(calls) == 1000


async def test_a_plain_function_is_never_called_twice_at_once() -> None:
    began, go = threading.Event(), threading.Event()

    def blocks() -> str:
        began.set()
        go.wait(20)
        return "done"

    aside = Aside(blocks, "test")
    first = asyncio.create_task(aside())
    await eventually(began.is_set)
    with pytest.raises(TimedOut, match="has not ended yet"):
        await aside()
    first.cancel()  # whoever waits may go; the thread goes on
    await asyncio.wait({first})
    with pytest.raises(TimedOut, match="has not ended yet"):
        await aside()
    go.set()
    await eventually(lambda: not aside.is_running())
    assert await aside() == "done"


@virtual
async def test_a_pause_that_is_cancelled_as_it_is_woken_is_cancelled() -> None:
    wake = asyncio.Event()
    pausing = asyncio.create_task(pause(1000, wake))
    await asyncio.sleep(1)
    wake.set()
    await asyncio.sleep(0)
    pausing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pausing
    assert now() == 1


@pytest.mark.parametrize("answer", [None, OSError("no")], ids=repr)
async def test_whoever_is_cancelled_as_its_answer_comes_is_cancelled(answer) -> None:
    mailbox = Mailbox.current()
    reply = mailbox.reply()
    waiting = asyncio.create_task(reply.wait_for(1000))
    await asyncio.sleep(0)
    mailbox._handlers[reply.token](answer)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_an_answer_that_comes_too_late_harms_nobody() -> None:
    mailbox = Mailbox.current()
    reply = mailbox.reply()
    assert not await reply.wait_for(0.001)
    mailbox._handlers[reply.token](None)
    reply = mailbox.reply()
    mailbox._handlers[reply.token](OSError("no"))
    with pytest.raises(OSError, match="no"):
        await reply.wait_for(1000)
    assert not mailbox._handlers


@pytest.fixture
def elsewhere():
    """Runs things on a loop in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


class Broadcaster:
    def safe_emit(self, _: object):
        return asyncio.sleep(0)


@pytest.mark.parametrize(
    "part", [Heartbeat(Broadcaster(), "ada"), Aggregator(), ConnectionManager()], ids=["heart", "aggregator", "manager"]
)
async def test_what_was_started_on_one_loop_may_be_stopped_on_another(part, elsewhere) -> None:
    elsewhere(part.start())

    async def tasks() -> list[asyncio.Task]:
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert elsewhere(tasks())
    await asyncio.wait_for(part.stop(), 10)
    assert not elsewhere(tasks()), "it has ended when the stop returns"


@virtual
async def test_work_that_is_given_up_by_two_cancellations_is_still_held(caplog) -> None:
    ended = []

    async def stubborn() -> None:
        for _ in range(2):
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                await asyncio.sleep(0.5)
        ended.append(now())
        raise OSError("at last")

    waiting = asyncio.create_task(within(1000, stubborn()))
    for _ in range(2):
        await asyncio.sleep(0.1)
        waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    [left] = asyncio.all_tasks() - {asyncio.current_task()}
    gc.collect()
    await asyncio.sleep(1)
    left.cancel()
    await asyncio.wait({left})
    assert len(ended) == 1
    await asyncio.sleep(0)
    assert "OSError('at last')" in caplog.text
