"""Links through an object that users already have: ``connect``, ``wait_until_ready``, ``is_available``, ``send``.

The core asks for one thing at a time through the mailbox; a task on the loop that started the broadcaster does it.
What ``send`` returned for counts as delivered; what it raised for is sent again on the next link.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import weakref
from typing import TYPE_CHECKING, Any, cast

import orjson

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from safe_broadcaster import _core
    from safe_broadcaster.mailbox import Mailbox

__all__ = ["PeerServer", "is_peer"]

logger = logging.getLogger("safe_broadcaster")

_METHODS = ("connect", "wait_until_ready", "is_available", "send")

_WATCH = 0.05
"""Seconds between two looks at ``is_available`` of a client that reconnects by itself."""


def is_peer(client: object) -> bool:
    """Whether an object has what a ``ws_client`` needs."""
    return all(callable(getattr(client, name, None)) for name in _METHODS)


async def _maybe(outcome: object) -> Any:
    return await outcome if inspect.isawaitable(outcome) else outcome


class PeerServer:
    """Does what the core asks of a duck-typed ``ws_client``."""

    def __init__(self, core: _core.Emitter, client: Any) -> None:
        self._reference = weakref.ref(core)  # the core holds `probe`: a cycle that no collector could see
        self._client = client
        self._available = False
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._mailbox: Mailbox | None = None
        self._token = 0

    def _down(self, why: str) -> None:
        self._available = False
        if (core := self._reference()) is not None:
            core._peer_down(why)

    def probe(self) -> bool:
        """Whether the client can send now; asked before each event."""
        try:
            outcome = self._client.is_available()
        except Exception as error:  # noqa: BLE001 - a client that cannot even tell is not available
            logger.warning("ws_client.is_available() failed: %r", error)
            return False
        if inspect.isawaitable(outcome):
            if inspect.iscoroutine(outcome):
                outcome.close()
            return self._available  # an async answer comes too late for a call; the last one counts
        self._available = bool(outcome)
        return self._available

    def serve(self, mailbox: Mailbox) -> None:
        """Serve requests on the running loop from now on."""
        if self._mailbox is not None:
            self.stop()
            self._down("another event loop serves the ws_client now")
        self._mailbox = mailbox
        self._token = mailbox.subscribe(self._request)
        if (core := self._reference()) is not None:
            core._serve_peer(mailbox.core, self._token)

    def stop(self) -> None:
        """Serve nothing any more."""
        if self._mailbox is not None:
            self._mailbox.unsubscribe(self._token)
        self._cancel()

    def _cancel(self) -> None:
        running = asyncio.get_running_loop()
        for task in (self._task, self._watcher):
            if task is None or task.done():
                continue
            loop = task.get_loop()
            if loop is running:
                task.cancel()
            elif not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)
        self._task = self._watcher = None

    def _request(self, request: tuple[Any, ...]) -> None:
        kind = cast("str", request[0])
        if kind == "close":
            self._cancel()
            self._available = False
            if self._reference() is None:  # forgotten without stop()
                self.stop()
        elif kind == "connect":
            self._cancel()
            self._task = self._run(self._connect())
        else:
            _, first, events = request
            self._task = self._run(self._send(first, events))

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)

    async def _connect(self) -> None:
        try:
            # A client that is up already, or came back by itself, is not connected a second time.
            if not await _maybe(self._client.is_available()):
                await _maybe(self._client.connect())
                await _maybe(self._client.wait_until_ready())
        except asyncio.CancelledError:
            if asyncio.current_task() is self._task:  # as in _send
                self._down("ws_client.connect() was cancelled")
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the link is not there
            self._down(f"ws_client.connect() failed: {error!r}")
            return
        self._available = True
        if (core := self._reference()) is not None:
            core._peer_up()
        self._watcher = self._run(self._watch())

    async def _send(self, first: int, events: list[bytes]) -> None:
        seq = first
        try:
            for event in events:
                if not await _maybe(self._client.is_available()):
                    self._failed("ws_not_ready", seq - 1)
                    return
                await _maybe(self._client.send(orjson.loads(event)))
                seq += 1
        except asyncio.CancelledError:
            if asyncio.current_task() is self._task:  # the client's own cancellation; ours takes the task away before
                self._failed("ws_client.send() was cancelled", seq - 1)
            raise
        except Exception as error:  # noqa: BLE001 - the event stays stored and is sent again
            self._failed(f"ws_client.send() failed: {error!r}", seq - 1)
            return
        if (core := self._reference()) is not None:
            core._peer_sent(seq - 1)

    def _failed(self, why: str, sent: int) -> None:
        self._available = False
        if (core := self._reference()) is not None:
            core._peer_failed(sent, why)

    async def _watch(self) -> None:
        """See that the client has gone even if nothing is sent."""
        while True:
            await asyncio.sleep(_WATCH)
            try:
                available = bool(await _maybe(self._client.is_available()))
            except Exception as error:  # noqa: BLE001 - as above
                self._down(f"ws_client.is_available() failed: {error!r}")
                return
            if not available:
                self._down("ws_not_ready")
                return
