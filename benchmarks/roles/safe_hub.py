"""Our hub, until standard input closes. `python -m roles.safe_hub LOOP [SETTINGS as JSON]` prints where to publish and
to subscribe. The setting `redis` is the URL of a bus, `hubs` how many of them there are in this process (default 1);
what is printed is the first one's.
"""

import asyncio
import json
import sys
from contextlib import AsyncExitStack

from roles.loops import run
from safe_broadcaster import EventBroadcaster


async def main() -> None:
    settings = {"redis": None, "hubs": 1, "port": 0, **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}")}
    redis, count = settings.pop("redis"), settings.pop("hubs")
    async with AsyncExitStack() as stack:
        hubs = [await stack.enter_async_context(EventBroadcaster(redis, "bench", **settings)) for _ in range(count)]
        print(json.dumps({"publish": hubs[0].url, "subscribe": hubs[0].url}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    run(main(), sys.argv[1])
