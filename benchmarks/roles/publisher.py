"""Emits at an even rate. `python -m roles.publisher safe_broadcaster|python|bare URL LOOP`.

For each line `{"rate":R,"events":N}` on standard input it emits N events, R a second, and answers with one line.
"""

import asyncio
import json
import sys
import time

from kit.clients import Picows, Seed
from kit.event import pool
from kit.ours import Ours
from roles.loops import run


class Bare(Picows):
    """Wraps the event as a hub would that only passes it on."""

    async def emit(self, event: dict) -> bool:
        return await super().emit({"type": "event", "data": event})


CLIENTS = {"safe_broadcaster": Ours, "python": Seed, "bare": Bare}


async def main(name: str, url: str) -> None:
    client = CLIENTS[name]()
    await client.open(url)
    events = pool()
    print(json.dumps({"ready": True}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        began = time.perf_counter()
        for number in range(order["events"]):
            wait = began + number / order["rate"] - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            event = events[number % len(events)]
            event["at_ns"] = time.monotonic_ns()
            await client.emit(event)
        print(json.dumps({"emitted": order["events"]}), flush=True)
    await client.close()


if __name__ == "__main__":
    run(main(sys.argv[1], sys.argv[2]), sys.argv[3])
