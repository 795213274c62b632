"""Asks the counting sink, over a connection of its own, what has arrived: the same proof for every client."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from websockets.asyncio.client import ClientConnection, connect


class Count(NamedTuple):
    """What has arrived, and the seconds from the first to the last of it, by the sink's clock."""

    count: int
    bytes: int
    seconds: float


@asynccontextmanager
async def sink_count(port: int) -> AsyncIterator["SinkCount"]:
    """A connection to the sink, for questions only."""
    # Pings off: while a flood holds the loop, none could be answered.
    async with connect(f"ws://127.0.0.1:{port}/", ping_interval=None, compression=None) as socket:
        yield SinkCount(socket)


class SinkCount:
    """Totals over all connections of the sink."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    async def now(self) -> Count:
        return await self._ask("?", 10)

    async def reaches(self, count: int, timeout: float = 60) -> Count:
        """Waits until that many events have arrived; the sink answers at that moment, nobody polls."""
        return await self._ask(f">={count}", timeout)

    async def _ask(self, question: str, timeout: float) -> Count:
        await self._socket.send(question)
        return Count(**json.loads(await asyncio.wait_for(self._socket.recv(), timeout)))
