"""Circuit breakers of services: one for each, so that one that is down is left alone and the others are not.

::

    breakers = CircuitBreakers()
    await breakers["mail"].call(send_mail, message)  # CircuitOpen while the mail server is left alone
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safe_broadcaster.breaker import WebSocketCircuitBreaker, WebSocketCircuitState
from safe_broadcaster.calling import call, name_of
from safe_broadcaster.checks import check_count, check_number
from safe_broadcaster.exceptions import CircuitOpen, ConfigError
from safe_broadcaster.timestamps import utc_now, utc_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

__all__ = ["CircuitBreaker", "CircuitBreakers"]

MOST_BREAKERS = 1000
"""Services that one program may name; more are a mistake, such as a breaker for each request."""


class CircuitBreaker(WebSocketCircuitBreaker):
    """Opens after so many errors in a row, lets one call through after the cooldown, and closes if that succeeds.

    May be used from any thread.

    Args:
        max_consecutive_errors: Errors in a row after which it opens. Default 5: one or two are a hiccup.
        cooldown_period: Seconds that it stays open. Default 60: time for a service to be restarted.
        auto_reset: False: once open it stays so until `reset` is called.
        enabled: False: it counts and never opens.
        name: For people who read logs.
        clock: Seconds that only grow; a test gives its own.
        now: The wall clock, for ``trip_time``; a test gives its own.

    Raises:
        ConfigError: A number is not allowed.

    """

    def __init__(
        self,
        max_consecutive_errors: int = 5,
        cooldown_period: float = 60.0,
        auto_reset: bool = True,
        *,
        enabled: bool = True,
        name: str = "service",
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        check_count("max_consecutive_errors", max_consecutive_errors)
        check_number("cooldown_period", cooldown_period, 0)
        super().__init__(max_consecutive_errors, cooldown_period if auto_reset else math.inf, name=name, clock=clock)
        self.enabled = enabled
        self._now = now
        self._trip_time: datetime | None = None

    @property
    def tripped(self) -> bool:
        """Whether nothing is let through now."""
        return self.get_state() is WebSocketCircuitState.OPEN

    def is_call_permitted(self) -> bool:
        """Ask for one call. True promises its outcome: `record_success`, `record_failure`, or `release`."""
        return not self.enabled or super().is_call_permitted()

    def record_failure(self) -> None:
        """Note that a call failed."""
        if not self.enabled:
            with self._lock:
                self._failures += 1
            return
        before = self._opened
        super().record_failure()
        if self._opened != before:
            self._trip_time = self._now()

    async def call(self, function: Callable[..., Any], *arguments: object, timeout: float | None = None) -> Any:
        """Call a function of the service, if that is let through, and note what became of it.

        Args:
            function: Async, or plain: that runs in a thread.
            arguments: What it is given.
            timeout: Seconds it may take. None: any.

        Raises:
            CircuitOpen: It was not called: the service failed too often.
            HandlerTimeout: It took too long, which counts as a failure. A plain function is left to itself in its
                thread.
            Exception: What the function raises, which counts as a failure.

        """
        if not self.is_call_permitted():
            raise CircuitOpen(
                f"{self.name}: {name_of(function)} was not called, after {self.consecutive_failures} errors in a row; "
                f"try again in {self.retry_after():.1f} s"
            )
        try:
            result = await call(function, *arguments, timeout=timeout)
        except Exception:
            self.record_failure()
            raise
        except BaseException:  # cancelled: that says nothing of the service
            self.release()
            raise
        self.record_success()
        return result

    def get_status(self) -> dict[str, Any]:
        """Return ``enabled``, ``tripped``, ``consecutive_errors``, ``max_consecutive_errors``, ``trip_time``.

        ``trip_time`` is when it last opened, if it has not closed since.
        """
        closed = self.get_state() is WebSocketCircuitState.CLOSED
        return {
            "enabled": self.enabled,
            "tripped": self.tripped,
            "consecutive_errors": self.consecutive_failures,
            "max_consecutive_errors": self._failure_threshold,
            "trip_time": None if closed else utc_text(self._trip_time),
        }


class CircuitBreakers(Mapping[str, CircuitBreaker]):
    """A breaker for each service, made when it is first asked for by name.

    Args:
        settings: Those of `CircuitBreaker`, for all of them.

    Raises:
        ConfigError: A setting is not allowed; or when more than 1000 services are named.

    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._breakers: dict[str, CircuitBreaker] = {}
        self._lock = threading.Lock()
        CircuitBreaker(**settings)  # a wrong setting is told here

    def __getitem__(self, service: str) -> CircuitBreaker:
        """Return the breaker of a service."""
        with self._lock:
            found = self._breakers.get(service)
            if found is None:
                if len(self._breakers) >= MOST_BREAKERS:
                    raise ConfigError(
                        f"service={service!r} is not allowed: there are {MOST_BREAKERS} breakers already; "
                        "name services, not requests"
                    )
                settings: dict[str, Any] = {"name": service, **self._settings}
                found = self._breakers[service] = CircuitBreaker(**settings)
            return found

    def __iter__(self) -> Iterator[str]:
        """Iterate over the services that have been named."""
        return iter(tuple(self._breakers))

    def __len__(self) -> int:
        """Return how many services have been named."""
        return len(self._breakers)

    def __contains__(self, service: object) -> bool:
        """Whether the service has been named."""
        return service in self._breakers

    def get_status(self) -> dict[str, dict[str, Any]]:
        """Return the status of each, by service."""
        return {service: breaker.get_status() for service, breaker in tuple(self._breakers.items())}
