"""What several test modules share: waiting for conditions, and peers that behave exactly as badly as they are told."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import socket
import struct
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from typing_extensions import Self

POLL = 0.005
ACCEPT_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3

QUICK: dict[str, Any] = {
    "backoff_initial": 0.02,
    "backoff_max": 0.1,
    "report_interval": 0.05,
    "breaker_threshold": 1000,
}
"""Settings for tests in which an outage lasts milliseconds."""

NOWHERE = "ws://127.0.0.1:9/ws"
"""Nobody listens at the discard port."""


async def eventually(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Wait until the condition holds; fail with its source position if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {condition}"
        await asyncio.sleep(POLL)


def eventually_blocking(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """`eventually` for tests without an event loop."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {condition}"
        time.sleep(POLL)


def event(n: int, **more: Any) -> dict[str, Any]:
    """An event that can be recognised."""
    return {"type": "graph.delta.node.upsert", "topic": "graph/ada/delta/node", "content": {"n": n}, **more}


def numbers(events: list[dict[str, Any]]) -> list[int]:
    """The numbers that `event` was given."""
    return [each["content"]["n"] for each in events]


class HealthBus:
    """Keeps the reports."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    async def inject(self, report: dict[str, Any]) -> None:
        self.reports.append(report)

    def contents(self, kind: str) -> list[dict[str, Any]]:
        """The contents of all reports of this ``event_type``."""
        return [each["content"] for each in self.reports if each["content"]["event_type"] == kind]

    def kinds(self) -> Counter[str]:
        """How many reports of each ``event_type`` came."""
        return Counter(each["content"]["event_type"] for each in self.reports)


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A WebSocket frame from a server."""
    head = bytes([opcode | (0x80 if fin else 0)])
    if len(payload) < 126:
        head += bytes([len(payload)])
    elif len(payload) < 1 << 16:
        head += struct.pack("!BH", 126, len(payload))
    else:
        head += struct.pack("!BQ", 127, len(payload))
    return head + payload


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The opcode and payload of a client's frame."""
    first, second = await reader.readexactly(2)
    length = second & 0x7F
    if length == 126:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
    elif length == 127:
        (length,) = struct.unpack("!Q", await reader.readexactly(8))
    key = await reader.readexactly(4)
    masked = await reader.readexactly(length)
    pad = (key * (length // 4 + 1))[:length]
    payload = int.from_bytes(masked, "big") ^ int.from_bytes(pad, "big")
    return first & 0x0F, payload.to_bytes(length, "big")


class PlainServer:
    """A WebSocket server that speaks no protocol of ours: it reads events and answers Pings.

    ``pongs=False`` makes it read and stay silent. `greeting` is written after each handshake.
    """

    def __init__(self, *, pongs: bool = True, greeting: bytes = b"", tls: ssl.SSLContext | None = None) -> None:
        self.pongs = pongs
        self.greeting = greeting
        self.events: list[dict[str, Any]] = []
        self.connects = 0
        self.requests: list[dict[str, str]] = []
        self.closes: list[bytes] = []
        self.on_event: Callable[[dict[str, Any]], Awaitable[None]] | None = None
        self.port = 0
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def url(self) -> str:
        return f"ws{'s' if self._tls else ''}://127.0.0.1:{self.port}/ws"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._server.wait_closed()

    def cut(self) -> None:
        """End every connection with a TCP reset: what is under way is gone."""
        for writer in self._open.values():
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def write(self, data: bytes) -> None:
        """Write raw bytes to every connection."""
        for writer in self._open.values():
            writer.write(data)
            await writer.drain()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        self.connects += 1
        try:
            await self.handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the emitter or the test ended it
        finally:
            del self._open[task]
            writer.close()
            with contextlib.suppress(Exception):
                await writer.wait_closed()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection; subclasses misbehave here."""
        await self.shake_hands(reader, writer)
        writer.write(self.greeting)
        while True:
            opcode, payload = await read_frame(reader)
            if opcode == 0x1:
                received = orjson.loads(payload)
                self.events.append(received)
                if self.on_event is not None:
                    await self.on_event(received)
            elif opcode == 0x8:
                self.closes.append(payload)
                writer.write(frame(0x8, payload[:2]))
                return
            elif opcode == 0x9 and self.pongs:
                writer.write(frame(0xA, payload))

    async def shake_hands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """RFC 6455 §4.2.2, choosing no subprotocol."""
        headers = await self.read_request(reader)
        digest = hashlib.sha1(headers["sec-websocket-key"].encode() + ACCEPT_MAGIC, usedforsecurity=False).digest()
        writer.write(self.answer(base64.b64encode(digest).decode()))

    async def read_request(self, reader: asyncio.StreamReader) -> dict[str, str]:
        """Read the request; its headers, with lower-case names."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}
        self.requests.append(headers)
        return headers

    @staticmethod
    def answer(accept: str) -> bytes:
        """The handshake's answer."""
        return (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
        ).encode()


class SyncClient:
    """A duck-typed ``ws_client`` as in seed 000, with plain methods."""

    def __init__(self) -> None:
        self.up = True
        self.sent: list[dict[str, Any]] = []
        self.connects = 0
        self.fail_connect: Exception | None = None
        self.fail_send: Exception | None = None

    def connect(self) -> None:
        self.connects += 1
        if self.fail_connect is not None:
            raise self.fail_connect
        self.up = True

    def wait_until_ready(self) -> None:
        """Ready as soon as connected."""

    def is_available(self) -> bool:
        return self.up

    def send(self, event: dict[str, Any]) -> None:
        if self.fail_send is not None:
            raise self.fail_send
        self.sent.append(event)


class AsyncClient(SyncClient):
    """The same with async methods that really suspend; ``is_available`` is plain, as in the seed."""

    async def connect(self) -> None:
        await asyncio.sleep(0)
        super().connect()

    async def wait_until_ready(self) -> None:
        await asyncio.sleep(0)

    async def send(self, event: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        super().send(event)


class FullyAsyncClient(AsyncClient):
    """Even ``is_available`` has to be awaited."""

    async def is_available(self) -> bool:  # type: ignore[override]
        await asyncio.sleep(0)
        return self.up
