"""Real ASGI servers for tests, in a thread with a loop of their own on a free port of the loopback, and clients."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

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


def fetch(server: Server, path: str, body: object = None) -> tuple[int, bytes]:
    """GET, or with a body POST as JSON; blocks."""
    data = None if body is None else json.dumps(body).encode()
    address = f"http://127.0.0.1:{server.port}{path}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, data, {"content-type": "application/json"})
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


async def post(server: Server, path: str, body: object) -> tuple[int, object]:
    status, answer = await asyncio.to_thread(fetch, server, path, body)
    return status, json.loads(answer)


async def get(server: Server, path: str) -> str:
    return (await asyncio.to_thread(fetch, server, path))[1].decode()


@contextlib.contextmanager
def loaded(name: str):
    """An example application as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # FastAPI looks annotations up there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


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
