"""The network between engines and hubs: cuts at any byte, goes silent, crawls. Each connection draws its fate."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from typing_extensions import Self

__all__ = ["Proxy"]

_Fate = Literal["clean", "cut", "silent", "slow"]

_CHUNK = 64 << 10
_CRAWL = 256
"""Bytes at a time of a connection that crawls."""


class Proxy:
    """Listens on a port of its own and passes each connection to any of the hubs, until fate strikes."""

    def __init__(self, host: str, hub_ports: Sequence[int], rng: random.Random) -> None:
        self._host = host
        self._hub_ports = hub_ports
        self._rng = rng
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.calm = False
        """From now on the network is a good one."""
        self.cuts = 0
        """Connections that met a fate."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return 0 if self._server is None else self._server.sockets[0].getsockname()[1]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self._host, 0, limit=_CHUNK)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        fates: tuple[_Fate, ...] = ("clean", "cut", "silent", "slow")
        fate = self._rng.choices(fates, (50, 30, 10, 10))[0]
        after = int(10 ** self._rng.uniform(0, 6))
        upstream = self._rng.random() < 0.7
        if self.calm:
            fate = "clean"
        if fate != "clean":
            self.cuts += 1
        try:
            to_hub = await asyncio.open_connection(self._host, self._rng.choice(self._hub_ports), limit=_CHUNK)
        except OSError:
            _reset(writer)
            return
        try:
            forth = self._pass(reader, to_hub[1], fate if upstream else "clean", after)
            back = self._pass(to_hub[0], writer, "clean" if upstream else fate, after)
            ways = [asyncio.create_task(way) for way in (forth, back)]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)
        finally:
            _reset(to_hub[1])
            _reset(writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fate: _Fate, after: int) -> None:
        """Pass bytes in one direction; ends when one side does, or by fate."""
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if fate != "clean" and after <= len(data) and not self.calm:
                    writer.write(data[:after])
                    if fate == "cut":
                        return
                    if fate == "silent":  # half-open: nobody is told
                        await self._until_calm(3.0)
                        return
                    await self._crawl(writer, data[after:])
                    fate = "clean"
                    continue
                after -= len(data)
                writer.write(data)
                await writer.drain()

    async def _crawl(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        for start in range(0, len(data), _CRAWL):
            writer.write(data[start : start + _CRAWL])
            if not self.calm:
                await asyncio.sleep(0.005)

    async def _until_calm(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while not self.calm and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset: what is under way is gone."""
    sock = writer.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
