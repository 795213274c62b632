"""Sessions of clients whose sockets an ASGI server holds: FastAPI's, Starlette's, or any other's.

The session itself lives in the core, with the same protocol, bounds and answers as on the hub's own port. Here its
messages are only moved: one task for each session sends what has gathered, batch by batch, and takes the next batch
when the server has taken the one before; so a client that does not read is noticed by the core as a full socket is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

from safe_broadcaster.exceptions import ConnectRefused
from safe_broadcaster.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence

    from safe_broadcaster import _core

__all__ = ["Refused", "Session", "Sessions", "WebSocket", "is_connecting"]

logger = logging.getLogger("safe_broadcaster")

_STOPS = (3001, "the hub stops")
"""Close of a session that ended before it could say why."""


class WebSocket(Protocol):
    """What is used of ``starlette.websockets.WebSocket``, which is FastAPI's."""

    @property
    def scope(self) -> MutableMapping[str, Any]: ...  # noqa: D102 - Starlette's

    async def accept(self, subprotocol: str | None = None) -> None: ...  # noqa: D102 - Starlette's
    async def receive(self) -> MutableMapping[str, Any]: ...  # noqa: D102 - Starlette's
    async def send(self, message: Any, /) -> None: ...  # noqa: D102 - Starlette's
    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...  # noqa: D102 - Starlette's


class Refused(ConnectRefused):
    """The hub does not let a client in; ``status`` is the HTTP status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Session:
    """One client."""

    def __init__(self, core: _core.Hub, path: str, scope: Mapping[str, Any]) -> None:
        self._mailbox = Mailbox.current()
        self._bell = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._waits = self._ended = False
        self._token = self._mailbox.subscribe(self._rung)
        try:
            admitted = core.admit(self._mailbox.core, self._token, path, _headers(scope))
        except BaseException:
            self._mailbox.unsubscribe(self._token)
            raise
        if isinstance(admitted, tuple):
            self._mailbox.unsubscribe(self._token)
            raise Refused(*admitted)
        self.core = admitted

    def start(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> asyncio.Task[None]:
        """Send from now on, in a task of its own."""
        self._pump = asyncio.create_task(self._send_all(send), name=f"safe_broadcaster session {self.core.id}")
        return self._pump

    async def feed(self, message: str | bytes) -> None:
        """Hand over a message of the client; waits while the hub is busy with those before."""
        fed = self.core.feed_text(message) if isinstance(message, str) else self.core.feed_binary(message)
        while not fed:
            self._bell.clear()
            await self._bell.wait()
            fed = self.core.has_room()

    async def end(self) -> None:
        """Tell the hub that the client is gone, and wait until nothing is sent any more."""
        self._ended = True
        self.core.hang_up()
        if self._pump is not None:
            await asyncio.wait({self._pump})
        self._mailbox.unsubscribe(self._token)

    def _rung(self, _: object) -> None:
        self._bell.set()
        if self._pump is not None and not self._waits and self.core.is_over():
            self._pump.cancel()  # the server hangs on a client that reads nothing

    async def _send_all(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        try:
            closed = False
            while not closed and (batch := self.core.take()) is not None:
                for each in batch:
                    if isinstance(each, str):
                        await send({"type": "websocket.send", "text": each})
                    elif isinstance(each, bytes):
                        await send({"type": "websocket.send", "bytes": each})
                    else:
                        await self._close(send, each)
                        closed = True
                if not batch:
                    self._waits = True
                    self._bell.clear()
                    await self._bell.wait()
                    self._waits = False
            if not closed and not self._ended:
                await self._close(send, _STOPS)
        except asyncio.CancelledError:
            if not self.core.is_over():
                raise
        except Exception as error:  # noqa: BLE001 - each server has its own for a client that is gone
            logger.debug("session %s: the client is gone: %r", self.core.id, error)
        finally:
            self.core.hang_up()
            self._mailbox.unsubscribe(self._token)

    async def _close(self, send: Callable[[dict[str, Any]], Awaitable[None]], close: tuple[int, str]) -> None:
        code, reason = close
        await send({"type": "websocket.close", "code": code, "reason": reason})


class Sessions:
    """The clients that an application's own endpoints have brought."""

    def __init__(self, core: _core.Hub) -> None:
        self._core = core
        self._open: dict[int, tuple[WebSocket, Session]] = {}

    async def connect(self, websocket: WebSocket, events: Iterable[str]) -> None:
        """See `EventBroadcaster.connect`."""
        if id(websocket) in self._open:
            return
        await self._enter(websocket, events)

    async def serve(self, websocket: WebSocket, events: Iterable[str]) -> None:
        """See `EventBroadcaster.serve`."""
        session = await self._enter(websocket, events)
        try:
            await listen(session, websocket.receive)
        finally:
            await self.disconnect(websocket)

    async def handle_message(self, websocket: WebSocket, message: str | bytes) -> None:
        """See `EventBroadcaster.handle_message`."""
        session = self._session(websocket)
        if session is not None:
            await session.feed(message)

    async def disconnect(self, websocket: WebSocket) -> None:
        """See `EventBroadcaster.disconnect`."""
        session = self._session(websocket)
        if session is None:
            return
        self._forget(websocket)
        await session.end()
        if _is_open(websocket):
            with contextlib.suppress(Exception):  # each server has its own for a client that is gone
                await websocket.close()

    def record_ack(self, websocket: WebSocket, sequence: int) -> None:
        """See `EventBroadcaster.record_ack`."""
        session = self._session(websocket)
        if session is not None:
            session.core.record_ack(sequence)

    async def _enter(self, websocket: WebSocket, events: Iterable[str]) -> Session:
        try:
            session = Session(self._core, "/ws", websocket.scope)
        except Refused:
            await websocket.close(1008)  # before the handshake's end this is status 403
            raise
        try:
            patterns = list(events)
            if patterns:
                session.core.preset(patterns)
            if is_connecting(websocket):
                await websocket.accept(subprotocol=session.core.subprotocol)
        except BaseException:
            await session.end()
            raise
        self._open[id(websocket)] = (websocket, session)
        # Forgotten when nothing can be sent any more, also by endpoints that forget to disconnect.
        session.start(websocket.send).add_done_callback(lambda _: self._forget(websocket))
        return session

    def _session(self, websocket: WebSocket) -> Session | None:
        found = self._open.get(id(websocket))
        return found[1] if found else None

    def _forget(self, websocket: WebSocket) -> None:
        self._open.pop(id(websocket), None)


async def listen(session: Session, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
    """Feed a session with what its client says, until it is gone."""
    while True:
        message = await receive()
        kind = message["type"]
        if kind == "websocket.disconnect":
            return
        if kind == "websocket.receive":
            text: str | None = message.get("text")
            await session.feed(message["bytes"] if text is None else text)


def is_connecting(websocket: object) -> bool:
    """Whether the handshake is still to be answered; an endpoint may have done that itself."""
    state = getattr(websocket, "application_state", None)
    return getattr(state, "name", "CONNECTING") == "CONNECTING"


def _is_open(websocket: WebSocket) -> bool:
    states = (getattr(websocket, "application_state", None), getattr(websocket, "client_state", None))
    return all(getattr(state, "name", "") == "CONNECTED" for state in states)


def _headers(scope: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    offered: Sequence[str] = scope.get("subprotocols") or ()
    if offered and not any(name.lower() == b"sec-websocket-protocol" for name, _ in headers):
        headers.append((b"sec-websocket-protocol", ", ".join(offered).encode("latin-1")))
    return headers
