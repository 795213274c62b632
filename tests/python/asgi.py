"""Real ASGI servers for tests: in a thread with an event loop of their own, on a free port of the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading

import uvicorn
from typing_extensions import Self
from websockets.asyncio.client import connect

from support import eventually_blocking


class Server:
    """uvicorn in a thread."""

    def __init__(self, app, **settings) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        defaults = {"log_level": "error", "timeout_graceful_shutdown": 5}
        self.server = uvicorn.Server(uvicorn.Config(app, **{**defaults, **settings}))
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self) -> Self:
        self._thread.start()
        eventually_blocking(lambda: self.server.started or not self._thread.is_alive())
        assert self.server.started
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.socket.close()

    def url(self, path: str) -> str:
        return f"ws://127.0.0.1:{self.port}{path}"


async def subscribe(ws, *events, since=None) -> dict:
    data = {"events": list(events)}
    if since is not None:
        data["since"] = since
    await ws.send(json.dumps({"type": "subscribe", "data": data}))
    return json.loads(await ws.recv())


@contextlib.asynccontextmanager
async def subscriber(url, *events, **options):
    """A client that has subscribed, and its first position."""
    async with connect(url, **options) as ws:
        yield ws, await subscribe(ws, *events)


async def frame(ws) -> dict:
    return json.loads(await asyncio.wait_for(ws.recv(), 20))
