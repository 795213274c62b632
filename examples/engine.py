"""An engine that emits, with a gate at the start, heartbeats, and reports about its own link.

Run a hub first (`safe-broadcaster serve`), then: python examples/engine.py ws://127.0.0.1:8000/ws
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from safe_broadcaster import Heartbeat, SafeBroadcaster


class PrintingBus:
    """A health bus is anything with `inject`."""

    async def inject(self, report: dict[str, Any]) -> None:
        """Take a report."""
        content = report["content"]
        print(content["event_type"], content["top_rejects"] or "")


async def main(url: str, ticks: int = 5, pause: float = 1.0) -> None:
    """Emit one node for each tick."""
    spill = Path(gettempdir()) / "example_engine.db"
    async with SafeBroadcaster(url, spill_path=spill, health_bus=PrintingBus()) as broadcaster:
        await broadcaster.ready.wait()  # the gate: no tick before the link was live once
        async with Heartbeat(broadcaster, "ada"):  # the dashboard never looks dead
            for tick in range(ticks):
                await broadcaster.safe_emit(
                    {
                        "type": "graph.delta.node.upsert",
                        "topic": "graph/ada/delta/node",
                        "content": {"citizen_id": "ada", "node_id": f"n{tick}"},
                    }
                )
                await asyncio.sleep(pause)
        print(broadcaster.get_stats())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000/ws"))
