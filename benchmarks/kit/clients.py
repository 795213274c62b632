"""The clients that are compared. Each has `open(url)`, an awaitable `emit(event)`, and `close()`."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import orjson

from kit.seed_pattern import HealthBus, SeedBroadcaster, WebsocketsClient


class Ours:
    """`SafeBroadcaster`, confirming by Ping and Pong, as with any plain server."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="safe-broadcaster-bench-")

    async def open(self, url: str) -> None:
        self.broadcaster = broadcaster(url, Path(self._folder.name) / "spill.db")
        await self.broadcaster.start(timeout=10)
        self.emit = self.broadcaster.safe_emit

    async def close(self) -> None:
        await self.broadcaster.stop(drain_timeout=5)
        self._folder.cleanup()


def broadcaster(url: str, spill: Path, **settings: Any) -> Any:
    """A `SafeBroadcaster` with the settings of all benchmarks: kept in memory, limits that are never reached."""
    from safe_broadcaster import SafeBroadcaster  # noqa: PLC0415 the peers run without it

    limits = {"spill_max_events": 4_000_000, "spill_max_bytes": 4 << 30}
    return SafeBroadcaster(url, spill_path=str(spill), health_bus=None, durability="memory", **limits, **settings)


class Seed:
    """The pattern that is in use today, over `websockets`."""

    async def open(self, url: str) -> None:
        self._client = WebsocketsClient(url)
        pattern = SeedBroadcaster(self._client, HealthBus())
        await pattern.start()
        self.emit = pattern.safe_emit

    async def close(self) -> None:
        await self._client.close()


class Picows:
    """picows + orjson, the fastest Python client: writes at once, and waits where the socket's buffer is full."""

    async def open(self, url: str) -> None:
        import picows  # noqa: PLC0415 one client needs not the others

        self._writable = writable = asyncio.Event()
        writable.set()

        class Listener(picows.WSListener):
            def pause_writing(self) -> None:
                writable.clear()

            def resume_writing(self) -> None:
                writable.set()

        self._transport, _ = await picows.ws_connect(Listener, url)
        self._text = picows.WSMsgType.TEXT

    async def emit(self, event: dict) -> bool:
        self._transport.send(self._text, orjson.dumps(event))
        if not self._writable.is_set():
            await self._writable.wait()
        return True

    async def close(self) -> None:
        self._transport.disconnect()


class Aiohttp:
    """aiohttp + orjson, by the frame call that takes bytes."""

    async def open(self, url: str) -> None:
        import aiohttp  # noqa: PLC0415 one client needs not the others

        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url, compress=0)
        self._text = aiohttp.WSMsgType.TEXT

    async def emit(self, event: dict) -> bool:
        await self._socket.send_frame(orjson.dumps(event), self._text)
        return True

    async def close(self) -> None:
        await self._socket.close()
        await self._session.close()


CLIENTS = {"safe_broadcaster": Ours, "seed_pattern": Seed, "picows_orjson": Picows, "aiohttp_orjson": Aiohttp}
