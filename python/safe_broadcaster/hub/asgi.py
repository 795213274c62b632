"""The hub as an ASGI application: the routes of its own port, on the port of somebody else's server.

::

    app.mount("/hub", hub.asgi())
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from safe_broadcaster.exceptions import BroadcasterClosed, BroadcastError
from safe_broadcaster.hub.sessions import Refused, Session, listen
from safe_broadcaster.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from safe_broadcaster import _core
    from safe_broadcaster.hub.broadcaster import EventBroadcaster

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]

__all__ = ["HubApp"]


class HubApp:
    """An ASGI 3 application over a hub. As the root application it starts and stops the hub with the server."""

    def __init__(self, hub: EventBroadcaster, core: _core.Hub) -> None:
        self._hub = hub
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, request or lifespan."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        try:
            session = Session(self._core, _target(scope), scope)
        except Refused as refused:
            return await _deny(scope, send, refused.status, str(refused))
        except BroadcasterClosed as closed:
            return await _deny(scope, send, 503, str(closed))
        try:
            await send({"type": "websocket.accept", "subprotocol": session.core.subprotocol})
            session.start(send)
            await listen(session, receive)
        finally:
            await session.end()
        return None

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive, self._hub.config.max_message_bytes)
        if body is None:
            return
        headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        mailbox, bell = Mailbox.current(), asyncio.Event()
        token = mailbox.subscribe(lambda _: bell.set())
        watcher: asyncio.Task[None] | None = None
        try:
            exchange = self._core.answer(mailbox.core, token, scope["method"], _target(scope), headers, body)
            while (parts := exchange.take()) is not None:
                for part in parts:
                    if isinstance(part, bytes):
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                    else:
                        await send({"type": "http.response.start", "status": part[0], "headers": part[1]})
                if not parts:
                    watcher = watcher or asyncio.create_task(_gone(receive, bell))
                    bell.clear()
                    if watcher.done():
                        return
                    await bell.wait()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except BroadcasterClosed as closed:
            await _plain(send, 503, str(closed))
        finally:
            mailbox.unsubscribe(token)
            if watcher is not None:
                watcher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watcher

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self._hub.start()
                except BroadcastError as error:
                    return await send({"type": "lifespan.startup.failed", "message": str(error)})
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._hub.stop()
                return await send({"type": "lifespan.shutdown.complete"})


def _path(scope: Scope) -> str:
    """Return the path below the mount, which older servers cut off and newer ones do not."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    rest = path.removeprefix(root)
    return rest if rest.startswith("/") or not root else (path if rest else "/")


def _target(scope: Scope) -> str:
    query = scope.get("query_string", b"").decode("latin-1")
    return quote(_path(scope)) + (f"?{query}" if query else "")


async def _body(receive: Receive, limit: int) -> bytes | None:
    """Return the whole body, or enough of it to see that it is too large; None if the client left."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit or not message.get("more_body", False):
            return bytes(body)


async def _gone(receive: Receive, bell: asyncio.Event) -> None:
    """Ring when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    bell.set()


async def _plain(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode() + b"\n"})


async def _deny(scope: Scope, send: Send, status: int, reason: str) -> None:
    """Refuse a WebSocket; a server without the extension for it answers 403."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": reason.encode() + b"\n"})
