"""Asking a Redis how it is, with nothing but a socket (RESP2: https://redis.io/docs/latest/develop/reference/protocol-spec)."""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import unquote, urlsplit

__all__ = ["RedisError", "ask_redis"]


class RedisError(Exception):
    """It refuses, or what answers is none."""


async def ask_redis(url: str) -> dict[str, str]:
    """Return what ``INFO`` tells.

    Raises:
        RedisError: See there; the message says what it said.
        OSError: Nobody answers.

    """
    parts = urlsplit(url)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        raise RedisError("that is no redis:// or rediss:// address")  # it may hold a password: not repeated
    context = ssl.create_default_context() if parts.scheme == "rediss" else None
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 6379, ssl=context)
    try:
        if parts.password:
            login = [unquote(parts.username)] if parts.username else []
            await _ask(reader, writer, "AUTH", *login, unquote(parts.password))
        text = await _ask(reader, writer, "INFO")
    finally:
        writer.close()
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *words: str) -> str:
    encoded = [word.encode() for word in words]
    writer.write(b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded))
    line = (await reader.readuntil(b"\r\n")).decode(errors="replace").strip()
    kind, rest = line[:1], line[1:]
    if kind == "-":
        raise RedisError(rest)
    if kind == "+":
        return rest
    if kind != "$" or not rest.isdigit():
        raise RedisError("what answers there is no Redis")
    return (await reader.readexactly(int(rest) + 2)).decode(errors="replace")
