"""The way to one emitter: its queue, its breaker, and trying again."""

from __future__ import annotations

import asyncio
import json
import logging
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from safe_broadcaster.calling import Handler
from safe_broadcaster.exceptions import QueueFull
from safe_broadcaster.inbox import Inbox
from safe_broadcaster.retry import retry_delay

if TYPE_CHECKING:
    from collections.abc import Callable

    from safe_broadcaster.breakers import CircuitBreaker
    from safe_broadcaster.config import WhenFull

__all__ = ["Lane"]

logger = logging.getLogger(__name__)

_LOOK = 1.0
"""Most seconds between two looks at a breaker that is open: somebody may reset it by hand."""


class Lane:
    """See the module. Its items are events, each with the time at which it was put."""

    def __init__(
        self,
        name: str,
        emitter: Callable[[Any], object],
        breaker: CircuitBreaker,
        *,
        maxsize: int,
        when_full: WhenFull,
        batch_size: int,
        batch_delay: float,
        timeout: float | None,
        max_attempts: int | None,
        delays: tuple[float, float],
    ) -> None:
        self.name = name
        self.breaker = breaker
        self.inbox: Inbox[tuple[float, Any]] = Inbox(
            self._emit_all,
            maxsize=maxsize,
            when_full=when_full,
            name=f"queue of emitter {name}",
            batch=batch_size,
            linger=batch_delay,
        )
        self.emitted = self.failed = self.abandoned = self.errors = 0
        self.latency = self.latency_max = 0.0
        self.last_emission: float | None = None
        """Unix time."""
        self._last_error: str | None = None
        self._emit = Handler(emitter, timeout)
        self._batched = batch_size > 1
        self._refuses = when_full in {"raise", "wait"}
        self._maxsize = maxsize
        self._max_attempts = max_attempts
        self._delays = delays

    def check_room(self) -> None:
        """Raise `QueueFull` if an event would be refused."""
        if self._refuses and self.inbox.waiting >= self._maxsize:
            raise QueueFull(f"{self.inbox.name} is full: {self._maxsize} events wait; slow down, or give it more room")

    def get_stats(self) -> dict[str, Any]:
        """See `EmitterQueue.get_stats`."""
        return {
            "queue_size": len(self.inbox),
            "emitted": self.emitted,
            "failed": self.failed,
            "dropped": self.inbox.dropped,
            "abandoned": self.abandoned,
            "errors": self.errors,
            "latency_mean": self.latency / self.emitted if self.emitted else 0.0,
            "latency_max": self.latency_max,
            "last_error": self._last_error,
            "circuit_breaker": self.breaker.get_status(),
        }

    async def _emit_all(self, items: list[tuple[float, Any]]) -> None:
        hopeless = await self._emit_until_done(items)
        if hopeless and len(items) > 1:  # the others need not suffer for one
            for item in items:
                if await self._emit_until_done([item]):
                    self._give_up(1)
        elif hopeless:
            self._give_up(1)

    async def _emit_until_done(self, items: list[tuple[float, Any]]) -> bool:
        """Emit, trying again as long as that makes sense; True if it will never succeed."""
        events = [event for _, event in items]
        attempts = 0
        while True:
            if not self.breaker.is_call_permitted():
                await self._permission()
            try:
                await self._emit(events if self._batched else events[0])
            except Exception as error:  # noqa: BLE001 - whatever the emitter raises
                attempts += 1
                self.errors += 1
                self._last_error = f"{type(error).__name__}: {error}"
                if _is_hopeless(error):
                    self.breaker.release()
                    return True
                self.breaker.record_failure()
                if attempts == self._max_attempts:
                    self._give_up(len(items))
                    return False
                delay = retry_delay(attempts - 1, *self._delays)
                logger.warning("emitter %s failed, next try in %.1f s: %s", self.name, delay, self._last_error)
                await asyncio.sleep(delay)
            except BaseException:
                self.breaker.release()
                raise
            else:
                self.breaker.record_success()
                self._note(items)
                return False

    async def _permission(self) -> None:
        """Wait until the breaker permits a call."""
        after = self.breaker.retry_after()
        told = (self.name, after, len(self.inbox), self._last_error)
        logger.error("emitter %s failed too often and is left alone for %.0f s; %d events wait (%s)", *told)
        while not self.breaker.is_call_permitted():  # noqa: ASYNC110 - a breaker has no bell
            await asyncio.sleep(min(max(self.breaker.retry_after(), 0.01), _LOOK))

    def _note(self, items: list[tuple[float, Any]]) -> None:
        now = monotonic()
        self.emitted += len(items)
        self.latency += sum(now - put for put, _ in items)
        self.latency_max = max(self.latency_max, now - items[0][0])
        self.last_emission = time()

    def _give_up(self, count: int) -> None:
        self.failed += count
        logger.error("%d events could not be emitted to %s and are given up: %s", count, self.name, self._last_error)


def _is_hopeless(error: Exception) -> bool:
    """Whether the event is at fault and not the service.

    A certificate that is refused is a ValueError too, and so is an answer that cannot be read: a proxy's page of HTML.
    """
    return isinstance(error, (TypeError, ValueError)) and not isinstance(
        error, (OSError, json.JSONDecodeError, UnicodeDecodeError)
    )
