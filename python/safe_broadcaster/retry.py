"""Trying a broadcast again, with pauses that grow."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from safe_broadcaster.deadlines import call_here
from safe_broadcaster.exceptions import BroadcastError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = [
    "DEFAULT_BASE_DELAY",
    "DEFAULT_MAX_DELAY",
    "DEFAULT_MAX_RETRIES",
    "BroadcastRetryMetrics",
    "broadcast_with_retry",
    "retry_delay",
]

T = TypeVar("T")
logger = logging.getLogger("safe_broadcaster")

DEFAULT_MAX_RETRIES = 3
"""How often a failed broadcast is tried again."""
DEFAULT_BASE_DELAY = 1.0
"""Seconds before the first retry; doubles with each."""
DEFAULT_MAX_DELAY = 30.0
"""Longest pause in seconds, before the jitter."""


def _no_counts() -> dict[int, int]:
    return {0: 0, 1: 0, 2: 0, 3: 0}


@dataclass
class BroadcastRetryMetrics:
    """What became of broadcasts that may be tried again. Each number only grows."""

    total_attempts: int = 0
    """Calls of the broadcast function."""
    successful_broadcasts: int = 0
    """Broadcasts that succeeded, at once or later."""
    failed_broadcasts: int = 0
    """Broadcasts that were given up."""
    retries_exhausted: int = 0
    """Those of them that had been tried as often as allowed."""
    retry_counts: dict[int, int] = field(default_factory=_no_counts)
    """How many succeeded after so many retries."""

    def record_success(self, retries: int) -> None:
        """Note a broadcast that succeeded after so many retries."""
        self.successful_broadcasts += 1
        self.retry_counts[retries] = self.retry_counts.get(retries, 0) + 1

    def record_failure(self, *, exhausted: bool) -> None:
        """Note a broadcast that was given up."""
        self.failed_broadcasts += 1
        self.retries_exhausted += exhausted

    @property
    def success_rate(self) -> float:
        """Share of finished broadcasts that succeeded, 0 to 1; 1 before the first."""
        finished = self.successful_broadcasts + self.failed_broadcasts
        return self.successful_broadcasts / finished if finished else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, and ``success_rate``."""
        return {
            "total_attempts": self.total_attempts,
            "successful_broadcasts": self.successful_broadcasts,
            "failed_broadcasts": self.failed_broadcasts,
            "retries_exhausted": self.retries_exhausted,
            "retry_counts": dict(self.retry_counts),
            "success_rate": self.success_rate,
        }


def retry_delay(
    retries: int, base_delay: float, max_delay: float, uniform: Callable[[float, float], float] = random.uniform
) -> float:
    """Return the seconds before the next try, after so many retries: doubled each time, 10 to 30 % of jitter on top."""
    delay = min(base_delay * 2.0 ** min(retries, 64), max_delay)
    return delay + delay * uniform(0.1, 0.3)


async def broadcast_with_retry(
    broadcast_func: Callable[[], Awaitable[T] | T],
    message_type: str,
    *,
    max_retries: int = DEFAULT_MAX_RETRIES,
    base_delay: float = DEFAULT_BASE_DELAY,
    max_delay: float = DEFAULT_MAX_DELAY,
    metrics: BroadcastRetryMetrics | None = None,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    uniform: Callable[[float, float], float] = random.uniform,
) -> T:
    """Broadcast, and try again if that fails: after 1 s, 2 s, 4 s …, each pause longer by 10 to 30 %.

    What will not be better next time (`BroadcastError.is_final`: an event that can never be sent, a hub that was
    stopped) is not tried again.

    Args:
        broadcast_func: Makes one attempt, async or plain, for instance ``lambda: hub.broadcast_event(event)``.
        message_type: What is broadcast, for the log.
        max_retries: Retries after the first attempt.
        base_delay: Seconds before the first retry.
        max_delay: Longest pause in seconds, before the jitter.
        metrics: Where attempts are counted, for instance ``hub.broadcast_metrics``.
        sleep: Waits for so many seconds; a test gives its own.
        uniform: A random number from one to the other; a test gives its own.

    Returns:
        What ``broadcast_func`` returned.

    Raises:
        Exception: The last one of ``broadcast_func``, when all retries are used up.

    """
    counts = metrics or BroadcastRetryMetrics()
    attempt = 0
    while True:
        counts.total_attempts += 1
        try:
            result: T = await call_here(broadcast_func)
        except Exception as error:  # whatever the caller's function raises
            about = {"message_type": message_type, "attempt": attempt + 1}
            hopeless = isinstance(error, BroadcastError) and error.is_final
            if hopeless or attempt >= max_retries:
                counts.record_failure(exhausted=not hopeless)
                logger.error(  # noqa: TRY400 - whoever catches it has the traceback
                    "broadcast of %s failed after %d attempts: %s", message_type, attempt + 1, error, extra=about
                )
                raise
            delay = retry_delay(attempt, base_delay, max_delay, uniform)
            attempt += 1
            text = "broadcast of %s failed, retry %d of %d in %.1f s: %s"
            logger.warning(text, message_type, attempt, max_retries, delay, error, extra=about)
            await sleep(delay)
        else:
            counts.record_success(attempt)
            return result
