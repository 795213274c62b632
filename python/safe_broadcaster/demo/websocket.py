"""The client side of RFC 6455 without any I/O: bytes in, messages out.

It exists so that what reads the hub in the demo shares no code with the hub, and the package needs no further
dependency. Text messages, control frames and fragmentation are here; extensions are not offered.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Handshake", "Message", "Opcode", "ProtocolError", "Reader", "encode"]

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""RFC 6455 §1.3: proves that the server has read the key and speaks WebSocket."""

SHORT, MEDIUM, LONG = 125, 126, 127
"""RFC 6455 §5.2: a 7-bit length, or the mark that 16 or 64 bits follow."""

SWITCHING_PROTOCOLS = 101
CONTROL = 0x8
FIN = 0x80
MASKED = 0x80
RESERVED = 0x70


class ProtocolError(ConnectionError):
    """The peer broke RFC 6455, or refused the handshake."""


class Opcode(IntEnum):
    """What a frame is (RFC 6455 §5.2)."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


@dataclass(frozen=True)
class Message:
    """A whole message, or a control frame."""

    opcode: Opcode
    payload: bytes

    @property
    def close_code(self) -> int:
        """The code of a close frame; 1005 where it carries none (RFC 6455 §7.1.5)."""
        return struct.unpack_from("!H", self.payload)[0] if len(self.payload) > 1 else 1005


def encode(opcode: Opcode, payload: bytes) -> bytes:
    """One final frame as a client sends it: masked, as RFC 6455 §5.3 wants it."""
    size = len(payload)
    if size <= SHORT:
        head = struct.pack("!BB", FIN | opcode, MASKED | size)
    elif size <= 0xFFFF:  # noqa: PLR2004 the range of the 16-bit length
        head = struct.pack("!BBH", FIN | opcode, MASKED | MEDIUM, size)
    else:
        head = struct.pack("!BBQ", FIN | opcode, MASKED | LONG, size)
    key = os.urandom(4)
    mask = (key * (size // 4 + 1))[:size]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(mask, "big")
    return head + key + masked.to_bytes(size, "big")


class Handshake:
    """The opening handshake (RFC 6455 §4.1) as seen by the client.

    Args:
        host: Value of the ``Host`` header.
        resource: Path and query.
        protocols: Subprotocols to offer, the favourite first.
        headers: More headers to send.
    """

    def __init__(
        self, host: str, resource: str, *, protocols: tuple[str, ...] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        self.key = base64.b64encode(os.urandom(16))
        lines = {
            "Host": host,
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": self.key.decode(),
            "Sec-WebSocket-Version": "13",
            **({"Sec-WebSocket-Protocol": ", ".join(protocols)} if protocols else {}),
            **(headers or {}),
        }
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.request = f"GET {resource} HTTP/1.1\r\n{text}\r\n".encode()

    def check(self, response: bytes) -> None:
        """Checks the server's answer, up to and with the empty line.

        Raises:
            ProtocolError: The server refused, or it is no WebSocket server.
        """
        status, *lines = response.decode("latin-1").split("\r\n")
        words = status.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1."):  # noqa: PLR2004 version and status
            raise ProtocolError(f"it does not speak HTTP: {status[:80]!r}")
        if words[1] != str(SWITCHING_PROTOCOLS):
            raise ProtocolError(f"it answers {' '.join(words[1:])} instead of a WebSocket")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        expected = base64.b64encode(hashlib.sha1(self.key + GUID).digest()).decode()  # noqa: S324 RFC 6455 names SHA-1
        if headers.get("sec-websocket-accept") != expected:
            raise ProtocolError("its Sec-WebSocket-Accept is not the one of our key")


class Reader:
    """Turns received bytes into messages; keeps what is not whole yet.

    Args:
        max_bytes: Limit of one message, so that a peer cannot fill the memory.
    """

    def __init__(self, max_bytes: int = 64 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._opcode: Opcode | None = None

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yields the messages that ``data`` completes.

        Raises:
            ProtocolError: The bytes are no WebSocket frames of a server, or a message is over the limit.
        """
        self._buffer += data
        at = 0
        try:
            while (frame := self._frame(at)) is not None:
                first, start, at = frame
                message = self._message(first, bytes(self._buffer[start:at]))
                if message is not None:
                    yield message
        finally:
            del self._buffer[:at]

    def _frame(self, at: int) -> tuple[int, int, int] | None:
        """First byte, start and end of the payload of the frame at ``at``; None while it is not whole."""
        buffer = self._buffer
        available = len(buffer) - at
        if available < 2:  # noqa: PLR2004 the shortest frame
            return None
        first, size, start = buffer[at], buffer[at + 1], at + 2
        if first & RESERVED:
            raise ProtocolError("reserved bits are set, and no extension was agreed")
        if size & MASKED:
            raise ProtocolError("a server's frames are not masked (RFC 6455 §5.1)")
        if size >= MEDIUM:
            form, width = ("!H", 2) if size == MEDIUM else ("!Q", 8)
            if available < 2 + width:
                return None
            size, start = struct.unpack_from(form, buffer, start)[0], start + width
        if size + self._parts_bytes > self._max_bytes:
            raise ProtocolError(f"a message is over {self._max_bytes} bytes")
        return (first, start, start + size) if len(buffer) >= start + size else None

    def _message(self, first: int, payload: bytes) -> Message | None:
        try:
            opcode = Opcode(first & 0x0F)
        except ValueError:
            raise ProtocolError(f"unknown opcode {first & 0x0F:#x}") from None
        if opcode & CONTROL:
            if len(payload) > SHORT or not first & FIN:
                raise ProtocolError("a control frame is short and whole (RFC 6455 §5.5)")
            return Message(opcode, payload)
        if (opcode is Opcode.CONTINUATION) != (self._opcode is not None):
            raise ProtocolError("a fragment without its beginning, or a message within another")
        if first & FIN and self._opcode is None:
            return Message(opcode, payload)
        return self._fragment(opcode, payload, last=bool(first & FIN))

    def _fragment(self, opcode: Opcode, payload: bytes, *, last: bool) -> Message | None:
        self._opcode = self._opcode or opcode
        self._parts.append(payload)
        self._parts_bytes += len(payload)
        if not last:
            return None
        message = Message(self._opcode, b"".join(self._parts))
        self._parts, self._parts_bytes, self._opcode = [], 0, None
        return message
