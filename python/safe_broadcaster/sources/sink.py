"""Where sources broadcast to: a hub, a broadcaster, or any WebSocket manager."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

from safe_broadcaster.deadlines import TimedOut, call_here, within
from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sized

__all__ = ["Sink"]


class Sink:
    """Brings an event to whatever the user has.

    Args:
        target: A `SafeBroadcaster` (``safe_emit``), an `EventBroadcaster` (``broadcast_event``), or an object with
            ``broadcast(message)``, async or plain.

    Raises:
        ConfigError: It is none of these.

    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self._accepts_at_the_call = callable(getattr(target, "safe_emit", None))
        for name in ("safe_emit", "broadcast_event", "broadcast"):
            if callable(method := getattr(target, name, None)):
                self._method: Callable[[dict[str, Any]], Awaitable[Any] | Any] = method
                return
        raise ConfigError(
            f"websocket_manager={target!r} is not allowed: give a hub, a broadcaster, or an object with "
            "broadcast(message)"
        )

    async def send(self, event: dict[str, Any], timeout: float) -> None:
        """Broadcast an event, within so many seconds.

        A broadcaster has accepted it at the call (unless its memory is full and it is to wait). Its outcome is awaited
        for as long, and need not be known: to send the event again because its link is down would send it twice.
        """
        if not self._accepts_at_the_call:
            await within(timeout, call_here(self._method, event))
            return
        outcome = self._method(event)
        if inspect.isawaitable(outcome):
            try:
                await within(timeout, asyncio.ensure_future(outcome))
            except TimedOut:
                if not getattr(outcome, "is_accepted", True):
                    raise

    def can_tell_listeners(self) -> bool:
        """Whether the target knows if somebody listens."""
        return any(hasattr(self.target, name) for name in ("get_connection_count", "active_connections"))

    async def is_heard(self) -> bool:
        """Whether somebody listens; True where that cannot be known."""
        count: Callable[[], int | Awaitable[int]] | None = getattr(self.target, "get_connection_count", None)
        if count is not None:
            return await call_here(count) > 0
        connections: Sized | None = getattr(self.target, "active_connections", None)
        return True if connections is None else bool(connections)
