"""Other things that keep an event safe, used one event at a time and as their users use them.

What an event survives once `put` has returned differs, and so do the prices; each name says it as our levels do:
`process` is `kill -9` of whoever stores it, `power` is loss of power. Servers are started here, on ports of their own.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import orjson

from kit.processes import closed_port
from kit.servers import listening, server


class Queue(NamedTuple):
    """`put` returns when the event is kept; `count` tells how many are."""

    put: Callable[[dict], Awaitable[object]]
    count: Callable[[], Awaitable[int]]


@asynccontextmanager
async def persist_queue(folder: Path) -> AsyncIterator[Queue]:
    """WAL; `synchronous` as SQLite comes, FULL: each put is a synced transaction."""
    from persistqueue import SQLiteQueue  # noqa: PLC0415 one peer needs not the others

    queue = SQLiteQueue(str(folder / "persist-queue"))

    async def put(event: dict) -> None:
        queue.put(event)

    async def count() -> int:
        return queue.qsize()

    yield Queue(put, count)
    queue.close()


@asynccontextmanager
async def litequeue(folder: Path) -> AsyncIterator[Queue]:
    """WAL with `synchronous=NORMAL`, which the library sets: synced at checkpoints only."""
    from litequeue import LiteQueue  # noqa: PLC0415 one peer needs not the others

    queue = LiteQueue(folder / "litequeue.db")

    async def put(event: dict) -> None:
        queue.put(orjson.dumps(event).decode())

    async def count() -> int:
        return queue.qsize()

    yield Queue(put, count)
    queue.close()


@asynccontextmanager
async def redis(appendfsync: str, folder: Path) -> AsyncIterator[Queue]:
    """XADD is answered when the AOF was written: and synced with `always`, within a second with `everysec`."""
    from redis.asyncio import Redis  # noqa: PLC0415 one peer needs not the others

    port = closed_port()
    place = folder / f"redis-{appendfsync}"
    place.mkdir()
    options = ["--dir", place, "--save", "", "--appendonly", "yes", "--appendfsync", appendfsync]
    with server("redis-server", "--bind", "127.0.0.1", "--port", port, *options):
        await listening(port)
        async with Redis(port=port) as client:

            async def put(event: dict) -> None:
                await client.xadd("events", {"event": orjson.dumps(event)})

            yield Queue(put, partial(client.xlen, "events"))


@asynccontextmanager
async def jetstream(folder: Path) -> AsyncIterator[Queue]:
    """A stream on disk; the ack comes when it was written, the server syncs each two minutes."""
    import nats  # noqa: PLC0415 one peer needs not the others

    port = closed_port()
    with server("nats-server", "--addr", "127.0.0.1", "--port", port, "-js", "-sd", folder / "nats"):
        await listening(port)
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        stream = client.jetstream()
        await stream.add_stream(name="events", subjects=["events"])

        async def put(event: dict) -> None:
            await stream.publish("events", orjson.dumps(event))

        async def count() -> int:
            return (await stream.stream_info("events")).state.messages

        yield Queue(put, count)
        await client.close()


QUEUES: dict[str, Callable[[Path], AbstractAsyncContextManager[Queue]]] = {
    "persist-queue, SQLiteQueue.put · power": persist_queue,
    "litequeue, put · process": litequeue,
    "Redis XADD, appendfsync always · power": partial(redis, "always"),
    "Redis XADD, appendfsync everysec · process": partial(redis, "everysec"),
    "JetStream, publish and ack · process": jetstream,
}
