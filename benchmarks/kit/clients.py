"""The clients that are compared. Each has `open(url)`, an awaitable `emit(event)`, and `close()`."""

import asyncio

import orjson

from kit.ours import Ours
from kit.seed_pattern import HealthBus, SeedBroadcaster, WebsocketsClient


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
