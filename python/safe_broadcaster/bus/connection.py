"""One WebSocket client of a `ConnectionManager`: what waits for it, and the task that sends it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from safe_broadcaster.exceptions import BroadcasterClosed, QueueFull
from safe_broadcaster.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from safe_broadcaster.bus.connections import ManagerConfig

__all__ = ["Connection", "Socket"]

logger = logging.getLogger(__name__)

_GOODBYE = 3.0
"""Seconds that a client has to take the close frame, as it has with the hub."""


class Socket(Protocol):
    """What is used of a Starlette (FastAPI's) WebSocket."""

    async def accept(self) -> None: ...  # noqa: D102 - Starlette's
    async def send_text(self, data: str) -> None: ...  # noqa: D102 - Starlette's
    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...  # noqa: D102 - Starlette's


class Connection:
    """See the module."""

    def __init__(
        self, websocket: Socket, config: ManagerConfig, on_end: Callable[[Connection, int, str], object]
    ) -> None:
        self.websocket = websocket
        self.loop = asyncio.get_running_loop()
        self.subscriptions: set[str] = set()
        self.heard = self.loop.time()
        """When the client said something last."""
        self.sent = 0
        """Messages that the server has taken for it."""
        self._config = config
        self._on_end = on_end
        self._missed = 0
        self._sending_since: float | None = None
        disconnect = config.slow == "disconnect"
        self.inbox: Inbox[str] = Inbox(
            self._send,
            maxsize=config.queue_size,
            when_full="raise" if disconnect else "drop_oldest",
            name=f"connection {id(websocket):x}",
            batch=config.queue_size if config.batch_interval else 1,
            linger=config.batch_interval or 0.0,
            on_drop=self._miss,
        )

    def put(self, text: str) -> bool:
        """Queue a message; False if the client is gone, or is sent away because it reads too slowly."""
        try:
            return self.inbox.put_nowait(text)
        except BroadcasterClosed:
            return False
        except QueueFull:
            self._on_end(self, 3008, "reads too slowly")
            return False

    def is_stuck(self, seconds: float) -> bool:
        """Whether the server has hung on one message for so many seconds: the client reads nothing."""
        since = self._sending_since
        return since is not None and self.loop.time() - since > seconds

    async def close(self, code: int, reason: str, *, drain_timeout: float = 0.0) -> None:
        """Send no more, and close the socket."""
        await self.inbox.close(drain_timeout)
        if _is_gone(self.websocket):
            return
        closing = asyncio.ensure_future(self.websocket.close(code, reason))
        try:
            await asyncio.wait({closing}, timeout=_GOODBYE)
        finally:
            if not closing.done():
                closing.cancel()
            elif (error := closing.exception()) is not None:  # each server has its own for a client that is gone
                logger.debug("%s: closing: %r", self.inbox.name, error)

    def _miss(self, _: str) -> None:
        self._missed += 1

    async def _send(self, texts: list[str]) -> None:
        missed, self._missed = self._missed, 0
        if missed:
            texts = [f'{{"type":"gap","payload":{{"dropped":{missed}}}}}', *texts]
        if self._config.batch_interval and len(texts) > 1:
            texts = [f'{{"type":"batch","payload":[{",".join(texts)}]}}']
        try:
            for text in texts:
                self._sending_since = self.loop.time()
                await self.websocket.send_text(text)
                self.sent += 1
        except Exception as error:  # noqa: BLE001 - each server has its own for a client that is gone
            logger.debug("%s: the client is gone: %r", self.inbox.name, error)
            self._on_end(self, 1000, "gone")
        finally:
            self._sending_since = None


def _is_gone(websocket: Socket) -> bool:
    """Whether Starlette knows that there is nobody to say goodbye to."""
    states = (getattr(websocket, "application_state", None), getattr(websocket, "client_state", None))
    return any(getattr(state, "name", "") == "DISCONNECTED" for state in states)
