"""A subscriber over `websockets`, the same for every hub; for a URL of Redis, plain SUBSCRIBE by redis-py.
`python -m roles.subscriber URL LOOP`.

For each line `{"events":N}` on standard input it takes N events and prints the percentiles of their age on arrival.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from websockets.asyncio.client import connect

from kit.rounds import percentile
from roles.loops import run

CHANNEL = "bench:plain"
"""Where plain pub/sub takes place."""

Receive = Callable[[], Awaitable[str | bytes]]


async def main(url: str) -> None:
    over = over_redis if url.startswith("redis:") else over_websocket
    async with over(url) as receive:
        print(json.dumps({"ready": True}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            ages = await take(receive, json.loads(line)["events"])
            parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
            print(json.dumps({f"{name} ms": percentile(ages, part) for name, part in parts.items()}), flush=True)


@asynccontextmanager
async def over_websocket(url: str) -> AsyncIterator[Receive]:
    async with connect(url, compression=None, ping_interval=None) as websocket:
        await websocket.send(json.dumps({"type": "subscribe", "data": {"events": ["*"]}}))
        while json.loads(await websocket.recv()).get("action") != "subscribed":
            pass
        yield websocket.recv


@asynccontextmanager
async def over_redis(url: str) -> AsyncIterator[Receive]:
    import redis.asyncio  # noqa: PLC0415 the others need none

    async with redis.asyncio.from_url(url) as client, client.pubsub() as pubsub:
        await pubsub.subscribe(CHANNEL)

        async def receive() -> bytes:
            while True:
                message = await pubsub.get_message(timeout=None)
                if message and message["type"] == "message":
                    return message["data"]

        yield receive


async def take(receive: Receive, count: int) -> list[float]:
    """Ages in ms of the next `count` events; frames of other kinds are passed over."""
    ages: list[float] = []
    while len(ages) < count:
        frame = json.loads(await asyncio.wait_for(receive(), 30))
        if frame.get("type") == "event":
            ages.append((time.monotonic_ns() - frame["data"]["at_ns"]) / 1e6)
    return ages


if __name__ == "__main__":
    run(main(sys.argv[1]), sys.argv[2])
