"""A receiver that does not know this package: any WebSocket server will do.

With `stamp=True` each event carries `_sb`, by which repeats after a lost connection can be dropped.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from websockets.asyncio.server import ServerConnection, serve

from safe_broadcaster import SafeBroadcaster

marks: dict[tuple[str, str], int] = {}
received: list[int] = []


async def receive(connection: ServerConnection) -> None:
    """Keep the highest seq of each emitter and epoch, and drop what is not above it."""
    async for message in connection:
        event = json.loads(message)
        identity = event["_sb"]
        key = identity["emitter"], identity["epoch"]
        if identity["seq"] > marks.get(key, 0):
            marks[key] = identity["seq"]
            received.append(event["n"])


async def main() -> None:
    """Send a few events to ourselves."""
    with TemporaryDirectory() as folder:
        async with serve(receive, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            url = f"ws://127.0.0.1:{port}/"
            async with SafeBroadcaster(url, spill_path=Path(folder) / "spill.db", stamp=True) as broadcaster:
                for n in range(10):
                    await broadcaster.safe_emit({"type": "count", "n": n})
                await broadcaster.drain(5)
        print(received)


if __name__ == "__main__":
    asyncio.run(main())
