"""Emits at an even rate. `python -m roles.publisher safe_broadcaster|python|bare|redis URL LOOP`.

For each line `{"rate":R,"events":N}` on standard input it emits N events, R a second (0: as fast as it can), and
answers with one line.
"""

import asyncio
import json
import sys
import time

from kit.clients import Picows, Seed
from kit.event import pool
from kit.ours import Ours
from roles.loops import run
from roles.subscriber import CHANNEL


class Bare(Picows):
    """Wraps the event as a hub would that only passes it on."""

    async def emit(self, event: dict) -> bool:
        return await super().emit({"type": "event", "data": event})


class Redis:
    """PUBLISH by redis-py, one event at a time, as plain pub/sub is used."""

    async def open(self, url: str) -> None:
        import redis.asyncio  # noqa: PLC0415 one client needs not the others

        self._redis = redis.asyncio.from_url(url)

    async def emit(self, event: dict) -> bool:
        await self._redis.publish(CHANNEL, json.dumps({"type": "event", "data": event}))
        return True

    async def close(self) -> None:
        await self._redis.aclose()


CLIENTS = {"safe_broadcaster": Ours, "python": Seed, "bare": Bare, "redis": Redis}


async def main(name: str, url: str) -> None:
    client = CLIENTS[name]()
    await client.open(url)
    events = pool()
    print(json.dumps({"ready": True}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        began = time.perf_counter()
        pause = 1 / order["rate"] if order["rate"] else 0
        for number in range(order["events"]):
            wait = began + number * pause - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            event = events[number % len(events)]
            event["at_ns"] = time.monotonic_ns()
            await client.emit(event)
        print(json.dumps({"emitted": order["events"]}), flush=True)
    await client.close()


if __name__ == "__main__":
    run(main(sys.argv[1], sys.argv[2]), sys.argv[3])
