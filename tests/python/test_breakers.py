"""Circuit breakers of services: the numbers of their status, and calls through them."""

from __future__ import annotations

import asyncio
import threading
from datetime import datetime, timezone

import pytest

from safe_broadcaster import CircuitBreaker, CircuitBreakers, CircuitOpen, ConfigError, HandlerTimeout
from virtual import now, virtual


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def noon() -> datetime:
    return datetime(2024, 1, 3, 12, 0, 0, 500, tzinfo=timezone.utc)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_five_errors_in_a_row_open_it_for_sixty_seconds(clock) -> None:
    breaker = CircuitBreaker(clock=clock, now=noon)
    calm = {"enabled": True, "tripped": False, "consecutive_errors": 0, "max_consecutive_errors": 5, "trip_time": None}
    assert breaker.get_status() == calm
    for _ in range(5):
        assert breaker.is_call_permitted()
        breaker.record_failure()
    tripped = {**calm, "tripped": True, "consecutive_errors": 5, "trip_time": "2024-01-03T12:00:00Z"}
    assert breaker.get_status() == tripped
    assert (breaker.is_call_permitted(), breaker.retry_after()) == (False, 60.0)
    clock.now += 59.0
    assert (breaker.is_call_permitted(), breaker.retry_after()) == (False, 1.0)
    clock.now += 1.0
    assert (breaker.tripped, breaker.retry_after(), breaker.is_call_permitted()) == (False, 0.0, True)
    breaker.record_success()
    assert breaker.get_status() == calm


def test_without_auto_reset_it_stays_open_until_somebody_resets_it(clock) -> None:
    breaker = CircuitBreaker(1, auto_reset=False, clock=clock)
    breaker.record_failure()
    clock.now += 1e9
    assert breaker.tripped
    breaker.reset()
    assert breaker.is_call_permitted()


def test_a_disabled_one_counts_and_never_opens(clock) -> None:
    breaker = CircuitBreaker(enabled=False, clock=clock)
    for _ in range(100):
        breaker.record_failure()
    status = breaker.get_status()
    assert (status["enabled"], status["tripped"], status["consecutive_errors"]) == (False, False, 100)
    assert breaker.is_call_permitted()


def test_a_call_that_told_nothing_is_given_back(clock) -> None:
    breaker = CircuitBreaker(1, clock=clock)
    breaker.record_failure()
    clock.now += 60
    assert breaker.is_call_permitted()
    assert not breaker.is_call_permitted(), "one at a time"
    breaker.release()
    assert breaker.is_call_permitted()


@virtual
async def test_calls_go_through_until_they_fail_too_often() -> None:
    loop = asyncio.get_running_loop()
    breaker = CircuitBreaker(2, name="mail", clock=loop.time)
    called = []

    async def send(outcome: Exception | str) -> str:
        called.append(now())
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert await breaker.call(send, "sent") == "sent"
    for _ in range(2):
        with pytest.raises(OSError, match="down"):
            await breaker.call(send, OSError("down"))
    with pytest.raises(CircuitOpen, match=r"mail: .*send was not called, after 2 errors in a row; try again in 60.0 s"):
        await breaker.call(send, "sent")
    assert len(called) == 3
    await asyncio.sleep(60)
    assert await breaker.call(send, "sent") == "sent"
    with pytest.raises(HandlerTimeout):
        await breaker.call(asyncio.sleep, 100, timeout=1)
    assert breaker.consecutive_failures == 1


async def test_a_plain_function_that_hangs_is_a_failure_like_others() -> None:
    go, breaker = threading.Event(), CircuitBreaker(2)
    for _ in range(2):
        with pytest.raises(HandlerTimeout):
            await breaker.call(go.wait, 20, timeout=0.01)
    with pytest.raises(CircuitOpen):
        await breaker.call(go.wait, 20, timeout=0.01)
    go.set()


@virtual
async def test_a_cancelled_call_is_no_failure() -> None:
    breaker = CircuitBreaker(1, clock=asyncio.get_running_loop().time)
    task = asyncio.create_task(breaker.call(asyncio.sleep, 100))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait({task})
    assert (breaker.tripped, breaker.consecutive_failures) == (False, 0)


def test_each_service_has_its_own(clock) -> None:
    breakers = CircuitBreakers(max_consecutive_errors=1, clock=clock)
    breakers["mail"].record_failure()
    assert not breakers["mail"].is_call_permitted()
    assert breakers["redis"].is_call_permitted()
    assert breakers["mail"] is breakers["mail"]
    assert (list(breakers), len(breakers), "mail" in breakers, "x" in breakers) == (["mail", "redis"], 2, True, False)
    assert {name: status["tripped"] for name, status in breakers.get_status().items()} == {"mail": True, "redis": False}
    assert breakers["mail"].name == "mail"


def test_a_breaker_for_each_request_is_a_mistake_that_is_told() -> None:
    breakers = CircuitBreakers()
    for n in range(1000):
        breakers[f"request {n}"].record_success()
    with pytest.raises(ConfigError, match="there are 1000 breakers already; name services, not requests"):
        breakers["one more"].record_success()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_consecutive_errors": 0},
        {"cooldown_period": -1},
        {"cooldown_period": float("nan")},
        {"cooldown_period": "60"},
        {"max_consecutive_errors": 1.5},
    ],
)
def test_a_wrong_setting_is_named(wrong) -> None:
    for make in (CircuitBreaker, CircuitBreakers):
        with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}=.* is not allowed"):
            make(**wrong)
