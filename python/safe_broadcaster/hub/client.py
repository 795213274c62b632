"""The way to a hub of the same process, without a socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safe_broadcaster.exceptions import ConnectRefused

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from safe_broadcaster import _core
    from safe_broadcaster.hub.broadcaster import EventBroadcaster

__all__ = ["LocalClient"]


class LocalClient:
    """Brings events to a hub of the same process, without a socket.

    Given to ``SafeBroadcaster(hub.client)`` it carries the emitter protocol through a pipe; by hand it is a client
    like any other. It may be handed out before the hub starts and stays valid over restarts.
    """

    def __init__(self, hub: EventBroadcaster, core: _core.HubClient, running: asyncio.Event) -> None:
        self._hub = hub
        self._running = running
        self.core = core
        """The pipe, for `SafeBroadcaster`."""

    async def connect(self) -> None:
        """Raise `ConnectRefused` unless the hub is running."""
        if not self.is_available():
            raise ConnectRefused("the hub of this process is not running; start it first")

    async def wait_until_ready(self) -> None:
        """Wait until the hub is running."""
        await self._running.wait()

    def is_available(self) -> bool:
        """Whether the hub is running."""
        return self._running.is_set()

    async def send(self, event: Mapping[str, Any]) -> None:
        """Publish an event."""
        await self._hub.broadcast_event(event)
