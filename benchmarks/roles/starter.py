"""Starts a broadcaster on a spill that has events. `python -m roles.starter URL SPILL LOOP`.

Waits for a line on standard input, starts, answers with the moment before `start()` by CLOCK_MONOTONIC when all is
confirmed.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

from kit.ours import safe_broadcaster
from roles.loops import run


async def main(url: str, spill: str) -> None:
    broadcaster = safe_broadcaster(url, Path(spill))
    print(json.dumps({"ready": True}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began = time.monotonic()
    await broadcaster.start(timeout=10)
    assert await broadcaster.drain(60), "not all was confirmed"
    await broadcaster.stop()
    print(json.dumps({"began": began}), flush=True)


if __name__ == "__main__":
    run(main(sys.argv[1], sys.argv[2]), sys.argv[3])
