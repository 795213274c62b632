"""The circuit breaker, on a clock of the test's own."""

from __future__ import annotations

import pytest

from safe_broadcaster import ConfigError, WebSocketCircuitBreaker, WebSocketCircuitState

CLOSED, OPEN, HALF_OPEN = WebSocketCircuitState


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_it_opens_after_so_many_failures_in_a_row(clock) -> None:
    breaker = WebSocketCircuitBreaker(failure_threshold=3, clock=clock)
    for _ in range(2):
        breaker.record_failure()
    breaker.record_success()
    for _ in range(2):
        breaker.record_failure()
    assert (breaker.get_state(), breaker.is_call_permitted()) == (CLOSED, True)
    breaker.record_failure()
    assert (breaker.get_state(), breaker.is_call_permitted()) == (OPEN, False)
    assert breaker.get_metrics() == {"name": "websocket", "state": "open", "failure_count": 3, "opened": 1}


def test_after_the_timeout_a_few_calls_decide(clock) -> None:
    breaker = WebSocketCircuitBreaker(1, 30.0, half_open_max_calls=2, success_threshold=2, clock=clock)
    breaker.record_failure()
    clock.now += 29.9
    assert breaker.state is OPEN
    clock.now += 0.1
    assert breaker.state is HALF_OPEN
    assert [breaker.is_call_permitted() for _ in range(3)] == [True, True, False]
    breaker.record_success()
    assert breaker.state is HALF_OPEN
    assert breaker.is_call_permitted(), "one has its outcome"
    breaker.record_success()
    assert breaker.state is CLOSED


def test_a_failure_in_between_opens_it_for_another_timeout(clock) -> None:
    breaker = WebSocketCircuitBreaker(5, 10.0, clock=clock)
    for _ in range(5):
        breaker.record_failure()
    clock.now += 10
    assert breaker.is_call_permitted()
    breaker.record_failure()
    assert breaker.state is OPEN
    clock.now += 10
    assert breaker.is_call_permitted()
    breaker.record_success()
    assert breaker.state is CLOSED
    breaker.record_failure()
    assert breaker.state is CLOSED, "failures are counted anew"
    breaker.reset()
    assert breaker.get_metrics()["failure_count"] == 0


def test_values_are_the_words_on_the_wire() -> None:
    assert [state.value for state in WebSocketCircuitState] == ["closed", "open", "half_open"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"failure_threshold": 0},
        {"failure_threshold": "5"},
        {"half_open_max_calls": 0},
        {"success_threshold": -1},
        {"recovery_timeout": -1},
        {"recovery_timeout": float("nan")},
    ],
)
def test_a_wrong_value_is_named(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        WebSocketCircuitBreaker(**wrong)
