"""A system that starts in order: schemas, hub, broadcaster, engines, health tools. Nothing ticks before its link is up.

    python examples/boot.py

Break a step (``python examples/boot.py --break engines``) to see the others undone.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safe_broadcaster import BootFailed, BootSequence, EventBroadcaster, Heartbeat, SafeBroadcaster

CITIZENS = ["ada-architect", "atlas-infrastructure"]


class Engine:
    """Ticks, and lets everyone know that it lives."""

    def __init__(self, citizen_id: str, broadcaster: SafeBroadcaster) -> None:
        self.citizen_id = citizen_id
        self.broadcaster = broadcaster
        self.ticks = 0
        self.heartbeat = Heartbeat(broadcaster, citizen_id, interval=30.0, snapshot=self.snapshot)
        self._task: asyncio.Task[None] | None = None

    def snapshot(self) -> dict[str, Any]:
        """Tell what a dashboard shows beside the last heartbeat."""
        return {"wm_size": self.ticks % 7, "last_tick": self.ticks}

    async def start(self) -> None:
        """Begin to tick."""
        await self.heartbeat.start()
        self._task = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        """Tick no longer, and say goodbye."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self.heartbeat.stop()

    async def _tick(self) -> None:
        while True:
            await self.broadcaster.safe_emit(
                {
                    "type": "graph.delta.node.upsert",
                    "topic": f"graph/{self.citizen_id}/delta/node",
                    "content": {"citizen_id": self.citizen_id, "node_id": f"n{self.ticks}"},
                }
            )
            self.ticks += 1
            await asyncio.sleep(0.1)


class HealthBus:
    """What the broadcaster reports about itself comes here."""

    def __init__(self) -> None:
        self.reports: list[str] = []

    def inject(self, report: dict[str, Any]) -> None:
        """Take a report."""
        self.reports.append(report["content"]["event_type"])


async def ingest_schemas() -> None:
    """Stand for what must be there before anything else."""
    await asyncio.sleep(0.01)


def sequence(
    hub: EventBroadcaster, broadcaster: SafeBroadcaster, engines: list[Engine], broken: str = ""
) -> BootSequence:
    """Put the five steps together."""
    boot = BootSequence(timeout=10.0, progress=print)

    @boot.step("schemas")
    async def schemas() -> None:
        await ingest_schemas()

    boot.add("hub", hub, depends_on=["schemas"], ready=hub.is_listener_healthy)
    boot.add("broadcaster", broadcaster, depends_on=["hub"], ready=broadcaster.ready)

    async def stop_engines() -> None:
        await asyncio.gather(*(engine.stop() for engine in engines))

    @boot.step("engines", depends_on=["broadcaster"], undo=stop_engines)
    async def start_engines() -> None:
        if broken == "engines":
            raise RuntimeError("no graph to walk")
        await asyncio.gather(*(engine.start() for engine in engines))

    @boot.step("health tools", depends_on=["engines"])
    async def start_health_tools() -> None:
        await hub.publish_ready()
        print("health:", broadcaster.get_stats()["emit_success_rate_1m"])

    return boot


async def main(seconds: float = 1.0, port: int = 0, broken: str = "") -> int:
    """Run the system for some seconds; returns the number of events that the engines emitted."""
    with TemporaryDirectory() as folder:
        hub, health = EventBroadcaster(port=port), HealthBus()
        broadcaster = SafeBroadcaster(hub.client, Path(folder) / "spill.db", health)
        engines = [Engine(citizen, broadcaster) for citizen in CITIZENS]
        boot = sequence(hub, broadcaster, engines, broken)
        try:
            report = await boot.run()
        except BootFailed as failed:
            print(failed)
            raise SystemExit(1) from None
        print(f"up after {report.seconds:.2f} s:", ", ".join(report.took))
        await asyncio.sleep(seconds)
        await boot.stop()
        emitted = sum(engine.ticks for engine in engines)
        events = [message["data"] for message in hub.get_messages_since(0)]
        nodes = sum(event["type"] == "graph.delta.node.upsert" for event in events)
        print(f"{emitted} nodes emitted, {nodes} in the hub's log; reports: {', '.join(health.reports)}")
        return emitted


if __name__ == "__main__":
    asyncio.run(main(broken="engines" if "--break" in sys.argv else ""))
