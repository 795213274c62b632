"""A subscriber over `websockets`, the same for every hub. `python -m roles.subscriber URL LOOP`.

For each line `{"events":N}` on standard input it takes N events and prints the percentiles of their age on arrival.
"""

import asyncio
import json
import sys
import time

from websockets.asyncio.client import connect

from kit.rounds import percentile
from roles.loops import run


async def main(url: str) -> None:
    async with connect(url, compression=None, ping_interval=None) as websocket:
        await websocket.send(json.dumps({"type": "subscribe", "data": {"events": ["*"]}}))
        while json.loads(await websocket.recv()).get("action") != "subscribed":
            pass
        print(json.dumps({"ready": True}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            ages = await receive(websocket, json.loads(line)["events"])
            parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
            print(json.dumps({f"{name} ms": percentile(ages, part) for name, part in parts.items()}), flush=True)


async def receive(websocket: object, count: int) -> list[float]:
    """Ages in ms of the next `count` events; frames of other kinds are passed over."""
    ages: list[float] = []
    while len(ages) < count:
        frame = json.loads(await asyncio.wait_for(websocket.recv(), 30))
        if frame.get("type") == "event":
            ages.append((time.monotonic_ns() - frame["data"]["at_ns"]) / 1e6)
    return ages


if __name__ == "__main__":
    run(main(sys.argv[1]), sys.argv[2])
