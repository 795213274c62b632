"""Our hub, until standard input closes. `python -m roles.safe_hub LOOP [SETTINGS as JSON]` prints where to publish and
to subscribe.
"""

import asyncio
import json
import sys

from roles.loops import run
from safe_broadcaster import EventBroadcaster


async def main() -> None:
    settings = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    async with EventBroadcaster(None, "bench", **{"port": 0, **settings}) as hub:
        print(json.dumps({"publish": hub.url, "subscribe": hub.url}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    run(main(), sys.argv[1])
