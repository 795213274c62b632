"""A subscriber of the hub: reads its frames over a WebSocket, comes back by itself, and resumes where it was.

The frames are those of the hub's subscriber protocol (JSON text). Sharing no code with the hub, it is an independent
witness of what the hub delivers.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import orjson

from safe_broadcaster.demo.websocket import Handshake, Message, Opcode, ProtocolError, Reader, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

__all__ = ["Position", "Refused", "Subscriber"]

T = TypeVar("T")

PROTOCOL = "sb.v1.json"
CHUNK = 256 * 1024
OPENING_TIMEOUT = 5.0
CLOSING_TIMEOUT = 1.0

HEARTBEAT = 20.0
"""Seconds of silence after which the hub is asked for a sign of life. It says how far it is: whoever wants rare events
would else stay at an old position, until the hub's log has forgotten it."""

IDLE_TIMEOUT = 60.0
"""Seconds of silence after which the link is dead: more than two of the hub's ping intervals."""

FINAL_CODES = (range(3500, 4000), range(4500, 5000))
"""Close codes that say *do not come back*."""


class Refused(ConnectionError):
    """The hub says that coming back is of no use."""


class Position(NamedTuple):
    """A place in the hub's log: an offset means something only within its epoch."""

    epoch: str
    offset: int


class _Closed(Exception):
    """The hub closed the connection."""


class Subscriber:
    """Follows the hub at ``url`` until it is cancelled.

    Args:
        url: ``ws://host:port/ws`` or ``wss://…``.
        on_event: Called with each event, in order and once.
        patterns: Which events; ``*`` for all.
        on_notice: Called with every other frame of the hub, and with ``{"type": "offline", …}`` when the link is lost.
        token: Sent as ``auth`` frame where the hub wants one.
        pause: Seconds between attempts to connect, with up to half as much again at random.
        heartbeat: Seconds of silence after which the hub is asked for a sign of life, and for the position.
    """

    def __init__(
        self,
        url: str,
        on_event: Callable[[dict[str, Any]], None],
        *,
        patterns: Sequence[str] = ("*",),
        on_notice: Callable[[dict[str, Any]], None] = lambda _frame: None,
        token: str | None = None,
        pause: float = 0.05,
        heartbeat: float = HEARTBEAT,
    ) -> None:
        self.url = url
        self.position: Position | None = None
        self.connected = asyncio.Event()
        """Set while the hub has confirmed the subscription."""
        self.holes = 0
        """Gaps that the hub announced, or that ``prev`` showed."""
        self._on_event = on_event
        self._on_notice = on_notice
        self._patterns = list(patterns)
        self._token = token
        self._pause = pause
        self._heartbeat = heartbeat
        self._rewinding = False
        self._offline = False

    async def run(self) -> None:
        """Connects, follows, and connects again; ends only by cancellation.

        Raises:
            Refused: The hub closed with a code that says *do not come back*.
        """
        while True:
            try:
                await self._session()
            except (OSError, EOFError, asyncio.TimeoutError, _Closed) as error:
                if isinstance(error, Refused):
                    raise
                self._lost(str(error) or type(error).__name__)
            await asyncio.sleep(self._pause * random.uniform(1.0, 1.5))  # noqa: S311 spreads load, guards nothing

    def _lost(self, reason: str) -> None:
        """Says once that the link is not there, however often it is tried again."""
        if not self._offline:
            self._on_notice({"type": "offline", "data": {"reason": reason}})
        self._offline = True
        self.connected.clear()

    async def _session(self) -> None:
        reader, writer = await _within(OPENING_TIMEOUT, connect(self.url))
        try:
            if self._token is not None:
                _send(writer, {"type": "auth", "data": {"token": self._token}})
            self._subscribe(writer)
            frames = Reader()
            while data := await self._read(reader, writer):
                for message in frames.feed(data):
                    self._message(message, writer)
                await writer.drain()
            raise EOFError("the connection ended")
        finally:
            writer.close()
            with suppress(OSError, asyncio.TimeoutError):
                await _within(CLOSING_TIMEOUT, writer.wait_closed())

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        try:
            return await _within(self._heartbeat, reader.read(CHUNK))
        except asyncio.TimeoutError:
            _send(writer, {"type": "ping"})
        return await _within(IDLE_TIMEOUT - self._heartbeat, reader.read(CHUNK))

    def _subscribe(self, writer: asyncio.StreamWriter) -> None:
        request: dict[str, Any] = {"events": self._patterns}
        if self.position is not None:
            request["since"] = self.position._asdict()
        _send(writer, {"type": "subscribe", "data": request})

    def _message(self, message: Message, writer: asyncio.StreamWriter) -> None:
        match message.opcode:
            case Opcode.TEXT:
                self._frame(message.payload, writer)
            case Opcode.PING:
                writer.write(encode(Opcode.PONG, message.payload))
            case Opcode.CLOSE:
                writer.write(encode(Opcode.CLOSE, message.payload[:2]))
                code, reason = message.close_code, message.payload[2:].decode(errors="replace")
                if any(code in codes for codes in FINAL_CODES):
                    raise Refused(f"{self.url} closed with {code} {reason}: it does not want us back")
                raise _Closed(f"closed with {code} {reason}".rstrip())
            case _:
                pass

    def _frame(self, payload: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            frame: dict[str, Any] = orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise ProtocolError(f"a frame is not JSON: {error}") from error
        match frame:
            case {"type": "event", "seq": int(offset), "data": dict()}:
                if not self._rewinding:
                    self._event(frame, offset, frame["data"])
                return
            case {"action": "subscribed", "epoch": str(epoch), "offset": int(offset)}:
                self._subscribed(frame, Position(epoch, offset), writer)
            case {"type": "ping" | "pong" as kind, **more}:
                if kind == "ping":
                    _send(writer, {"type": "pong"})
                self._reached(more)
                return
            case {"type": "gap", "seq": int(offset)}:  # an emitter has lost events, and that is an entry of the log
                self._gap(offset)
            case {"type": "gap", "data": {"to": int(offset)}}:  # the hub has left out entries of its log for us
                self._gap(offset)
            case _:
                pass
        self._on_notice(frame)

    def _event(self, frame: dict[str, Any], offset: int, event: dict[str, Any]) -> None:
        if self.position is not None and frame.get("prev", 0) > self.position.offset:
            self.holes += 1
        self._on_event(event)
        self._advance(offset)

    def _gap(self, offset: int) -> None:
        self.holes += 1
        if not self._rewinding:
            self._advance(offset)

    def _reached(self, told: dict[str, Any]) -> None:
        """All up to there was sent if it was for us: a position that no event has moved for long is moved by this."""
        match told:
            case {"epoch": str(epoch), "offset": int(offset)}:
                if not self._rewinding and self.position is not None and self.position.epoch == epoch:
                    self._advance(max(self.position.offset, offset))
            case _:
                pass

    def _advance(self, offset: int) -> None:
        if self.position is not None:
            self.position = self.position._replace(offset=offset)

    def _subscribed(self, frame: dict[str, Any], now: Position, writer: asyncio.StreamWriter) -> None:
        """Settles where this session begins.

        A hub of another epoch has begun a new log, of which nothing has been seen: it is asked for all of it, and what
        it sends live before that answer is passed over, because it will come again in its place.
        """
        known = self.position
        self._rewinding = known is not None and frame.get("recovered") is False and known.epoch != now.epoch
        if self._rewinding:
            self.position = Position(now.epoch, 0)
            self._subscribe(writer)
            return
        if frame.get("recovered") is False:
            self.holes += 1
        if known is None or frame.get("recovered") is False:
            self.position = now
        self._offline = False
        self.connected.set()


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Opens a connection and shakes hands.

    Raises:
        OSError: Nobody listens there, or (:class:`ProtocolError`) what listens is no WebSocket server.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "wss"
    if parts.scheme not in {"ws", "wss"} or not parts.hostname:
        raise ProtocolError(f"{url!r} is no ws:// or wss:// URL")
    context = ssl.create_default_context() if secure else None
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
    resource = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    handshake = Handshake(parts.netloc.rpartition("@")[2], resource, protocols=(PROTOCOL,))
    try:
        writer.write(handshake.request)
        handshake.check(await reader.readuntil(b"\r\n\r\n"))
    except (EOFError, asyncio.LimitOverrunError) as error:
        writer.close()
        raise ProtocolError(f"{url} does not answer as a WebSocket server") from error
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.wait_for`` that keeps every cancellation; before Python 3.12 that one loses those that come late."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
        if not done:
            raise asyncio.TimeoutError(f"nothing within {seconds:g} s")
        return task.result()
    finally:
        task.cancel()


def _send(writer: asyncio.StreamWriter, frame: dict[str, Any]) -> None:
    writer.write(encode(Opcode.TEXT, orjson.dumps(frame)))
