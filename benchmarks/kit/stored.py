"""When has what was emitted while offline reached the spill file?"""

import asyncio
import time
from typing import Any

from kit.event import SIZE


async def until_stored(broadcaster: Any, timeout: float = 120) -> None:
    """Waits until nothing is in memory any more and the file holds the bytes of all events; asks each millisecond.

    The depth of the spill would not do: an event counts as spilled from the moment it is accepted.
    """
    end = time.monotonic() + timeout
    while True:
        stats = broadcaster.get_stats()
        if stats["outbox_bytes"] == 0 and stats["spill_bytes"] >= stats["current_spill_depth"] * SIZE:
            return
        if time.monotonic() > end:
            raise TimeoutError(f"not all was stored: {stats}")
        await asyncio.sleep(0.001)
