"""When has what was emitted while offline reached the spill file?"""

import asyncio
from typing import Any


async def until_stored(broadcaster: Any, timeout: float = 120) -> None:
    """Waits until the spill holds every event that was accepted and not delivered; asks each millisecond."""
    end = asyncio.get_running_loop().time() + timeout
    while len(broadcaster.spill) < broadcaster.get_stats()["current_spill_depth"]:
        if asyncio.get_running_loop().time() > end:
            raise TimeoutError(f"{len(broadcaster.spill)} events stored")
        await asyncio.sleep(0.001)
