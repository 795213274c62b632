"""Waiting for a link, or for confirmations, may be given up and begun again as often as anybody likes."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from safe_broadcaster import BroadcasterClosed, ConnectTimeout, EventBroadcaster
from safe_broadcaster.mailbox import Mailbox
from support import NOWHERE, event


async def give_up(wait) -> None:
    with contextlib.suppress(ConnectTimeout):
        assert not await wait(0.0)


async def test_waiting_again_and_again_for_a_link_that_is_not_there_leaves_nothing_behind(make) -> None:
    broadcaster = make(NOWHERE)
    known = 0
    for n in range(100):
        await broadcaster.safe_emit(event(n))
        await asyncio.gather(*map(give_up, (broadcaster.start, broadcaster.wait_connected, broadcaster.drain)))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(broadcaster.ready.wait(), 0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(broadcaster.ready.wait(), 0.001)
        known = known or len(Mailbox.current()._handlers)
    assert len(Mailbox.current()._handlers) == known


async def test_a_wait_that_was_given_up_does_not_answer_for_what_came_later(make) -> None:
    async with EventBroadcaster(port=0) as hub:
        broadcaster = make(hub.client)
        for n in range(20):
            await broadcaster.safe_emit(event(n))
            if n == 0:
                await give_up(broadcaster.drain)
            await broadcaster.start()
            await broadcaster.safe_emit(event(n))
            assert await broadcaster.drain(10)
            assert broadcaster.get_stats()["acked_seq"] == 2 * n + 2


async def test_whoever_waits_is_told_of_the_end_and_nobody_else_is(make, caplog) -> None:
    broadcaster = make(NOWHERE)
    for wait in (broadcaster.start, broadcaster.wait_connected, broadcaster.drain):
        await broadcaster.safe_emit(event(1))
        await give_up(wait)
    waiting = asyncio.create_task(broadcaster.wait_connected(20))
    await asyncio.sleep(0)
    await broadcaster.stop(0)
    outcome = (await asyncio.gather(waiting, return_exceptions=True))[0]
    assert isinstance(outcome, BroadcasterClosed)
    assert "never retrieved" not in caplog.text
