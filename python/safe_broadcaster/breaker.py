"""A circuit breaker: after some failures in a row, nothing is tried for a while, and then carefully.

::

    breaker = WebSocketCircuitBreaker(failure_threshold=5, recovery_timeout=30.0)
    if breaker.is_call_permitted():
        try:
            ...
        except OSError:
            breaker.record_failure()
        else:
            breaker.record_success()
"""

from __future__ import annotations

import enum
import threading
import time
from typing import TYPE_CHECKING, Any

from safe_broadcaster.checks import check_count, check_number

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WebSocketCircuitBreaker", "WebSocketCircuitState"]


class WebSocketCircuitState(str, enum.Enum):
    """What a breaker lets through."""

    CLOSED = "closed"
    """Everything."""
    OPEN = "open"
    """Nothing, until ``recovery_timeout`` is over."""
    HALF_OPEN = "half_open"
    """A few calls, whose outcome decides."""


class WebSocketCircuitBreaker:
    """See the module. May be used from any thread; it does nothing by itself, so it needs no task and no cleaning up.

    Args:
        failure_threshold: Failures in a row after which it opens. Default 5.
        recovery_timeout: Seconds that it stays open. Default 30.
        half_open_max_calls: Calls that are let through in the half-open state and have no outcome yet. Default 1: the
            first tells enough.
        success_threshold: Successes in the half-open state that close it. Default 1.
        name: For people who read logs.
        clock: Seconds that only grow; a test gives its own.

    Raises:
        ConfigError: A number is below 1, or the timeout below 0.

    """

    def __init__(
        self,
        failure_threshold: int = 5,
        recovery_timeout: float = 30.0,
        half_open_max_calls: int = 1,
        success_threshold: int = 1,
        name: str = "websocket",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        counts = {
            "failure_threshold": failure_threshold,
            "half_open_max_calls": half_open_max_calls,
            "success_threshold": success_threshold,
        }
        for setting, value in counts.items():
            check_count(setting, value)
        check_number("recovery_timeout", recovery_timeout, 0)
        self.name = name
        self._failure_threshold = failure_threshold
        self._recovery_timeout = recovery_timeout
        self._half_open_max_calls = half_open_max_calls
        self._success_threshold = success_threshold
        self._clock = clock
        self._lock = threading.Lock()
        self._state = WebSocketCircuitState.CLOSED
        self._failures = 0
        self._successes = 0
        self._under_way = 0
        self._opened_at = 0.0
        self._opened = 0

    def get_state(self) -> WebSocketCircuitState:
        """Return the state now; an open breaker whose time is over is half-open."""
        with self._lock:
            return self._look()

    @property
    def state(self) -> WebSocketCircuitState:
        """The same as `get_state`."""
        return self.get_state()

    def is_call_permitted(self) -> bool:
        """Ask for one call. True promises its outcome: `record_success` or `record_failure`."""
        with self._lock:
            state = self._look()
            if state is WebSocketCircuitState.HALF_OPEN:
                if self._under_way >= self._half_open_max_calls:
                    return False
                self._under_way += 1
            return state is not WebSocketCircuitState.OPEN

    def record_success(self) -> None:
        """Note that a call succeeded."""
        with self._lock:
            self._failures = 0
            if self._look() is WebSocketCircuitState.HALF_OPEN:
                self._under_way = max(self._under_way - 1, 0)
                self._successes += 1
                if self._successes >= self._success_threshold:
                    self._state = WebSocketCircuitState.CLOSED

    def record_failure(self) -> None:
        """Note that a call failed."""
        with self._lock:
            state = self._look()
            self._failures += 1
            tripped = state is WebSocketCircuitState.CLOSED and self._failures >= self._failure_threshold
            if tripped or state is WebSocketCircuitState.HALF_OPEN:
                self._state = WebSocketCircuitState.OPEN
                self._opened_at = self._clock()
                self._opened += 1

    def release(self) -> None:
        """Give a permitted call back that told nothing of the service: it was cancelled, or could never succeed."""
        with self._lock:
            self._under_way = max(self._under_way - 1, 0)

    def retry_after(self) -> float:
        """Return the seconds for which nothing is let through; 0 where a call may be asked for."""
        with self._lock:
            if self._look() is not WebSocketCircuitState.OPEN:
                return 0.0
            return max(self._opened_at + self._recovery_timeout - self._clock(), 0.0)

    def reset(self) -> None:
        """Close it and forget all failures."""
        with self._lock:
            self._state = WebSocketCircuitState.CLOSED
            self._failures = 0

    @property
    def consecutive_failures(self) -> int:
        """Failures since the last success."""
        return self._failures

    def get_metrics(self) -> dict[str, Any]:
        """Return ``name``, ``state``, ``failure_count`` (in a row), and how often it has ``opened``."""
        with self._lock:
            state = self._look().value
            return {"name": self.name, "state": state, "failure_count": self._failures, "opened": self._opened}

    def _look(self) -> WebSocketCircuitState:
        if self._state is WebSocketCircuitState.OPEN and self._clock() - self._opened_at >= self._recovery_timeout:
            self._state = WebSocketCircuitState.HALF_OPEN
            self._successes = self._under_way = 0
        return self._state
