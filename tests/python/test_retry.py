"""Broadcasts that are tried again, with pauses that no test waits for."""

from __future__ import annotations

import asyncio

import pytest

from safe_broadcaster import (
    BroadcasterClosed,
    BroadcastRetryMetrics,
    EventBroadcaster,
    EventInvalid,
    broadcast_with_retry,
)
from safe_broadcaster.retry import DEFAULT_BASE_DELAY, DEFAULT_MAX_DELAY, DEFAULT_MAX_RETRIES


class Pauses(list):
    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


def failing(times: int, error: type[Exception] = OSError):
    left = [times]

    async def broadcast() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise error(f"{left[0]} left")
        return "done"

    return broadcast


@pytest.mark.parametrize(("share", "factor"), [(0.0, 1.1), (1.0, 1.3)])
async def test_pauses_double_up_to_the_cap_and_carry_10_to_30_percent_of_jitter(share, factor) -> None:
    pauses = Pauses()
    result = await broadcast_with_retry(
        failing(7),
        "alert",
        max_retries=7,
        sleep=pauses,
        uniform=lambda low, high: low + share * (high - low),
    )
    assert result == "done"
    assert pauses == pytest.approx([base * factor for base in (1, 2, 4, 8, 16, 30, 30)])


async def test_the_defaults_are_three_retries_from_one_second() -> None:
    assert (DEFAULT_MAX_RETRIES, DEFAULT_BASE_DELAY, DEFAULT_MAX_DELAY) == (3, 1.0, 30.0)
    pauses, metrics = Pauses(), BroadcastRetryMetrics()
    with pytest.raises(OSError, match="6 left"):
        await broadcast_with_retry(failing(10), "alert", metrics=metrics, sleep=pauses)
    for pause, base in zip(pauses, (1, 2, 4), strict=True):
        assert 1.1 * base <= pause <= 1.3 * base
    assert metrics.to_dict() == {
        "total_attempts": 4,
        "successful_broadcasts": 0,
        "failed_broadcasts": 1,
        "retries_exhausted": 1,
        "retry_counts": {0: 0, 1: 0, 2: 0, 3: 0},
        "success_rate": 0.0,
    }


async def test_successes_are_counted_by_their_retries() -> None:
    metrics = BroadcastRetryMetrics()
    assert metrics.success_rate == 1.0
    for times in (0, 0, 2, 5):
        await broadcast_with_retry(failing(times), "x", max_retries=5, metrics=metrics, sleep=Pauses())
    with pytest.raises(OSError):
        await broadcast_with_retry(failing(9), "x", max_retries=0, metrics=metrics, sleep=Pauses())
    assert metrics.retry_counts == {0: 2, 1: 0, 2: 1, 3: 0, 5: 1}
    assert (metrics.total_attempts, metrics.success_rate) == (12, 0.8)


@pytest.mark.parametrize("error", [EventInvalid, BroadcasterClosed])
async def test_what_cannot_get_better_is_not_tried_again(error) -> None:
    metrics = BroadcastRetryMetrics()
    with pytest.raises(error):
        await broadcast_with_retry(failing(9, error), "x", metrics=metrics, sleep=Pauses())
    assert (metrics.total_attempts, metrics.failed_broadcasts, metrics.retries_exhausted) == (1, 1, 0)


async def test_a_plain_function_may_broadcast_too() -> None:
    assert await broadcast_with_retry(lambda: 7, "x") == 7


async def test_cancelling_ends_it_at_once() -> None:
    waiting = asyncio.Event()

    async def forever(_: float) -> None:
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(broadcast_with_retry(failing(9), "x", sleep=forever))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_hub_counts_its_own() -> None:
    async with EventBroadcaster(port=0) as hub:
        assert await hub.broadcast_with_retry(lambda: hub.broadcast("a", 1), "a") == 0
        assert hub.get_broadcast_metrics()["retry_counts"][0] == 1
