"""One engine of the demo, a process of its own: walks its part of the import graph and emits what it finds.

It tells its parent how it fares by JSON lines on its standard output, and ends, after a drain, when its standard
input does: so it never outlives its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson

from safe_broadcaster.demo.modules import Facts, find_modules, library_roots, part_of, read_module
from safe_broadcaster.demo.pace import Pace
from safe_broadcaster.demo.verdict import EngineReport
from safe_broadcaster.emitter import SafeBroadcaster

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["Engine", "HealthBus", "main"]

HEARTBEAT = 1.0
WATCH = 0.02
STATUS = 0.1
DRAIN_TIMEOUT = 20.0


def now() -> str:
    """The time as events carry it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat()


class HealthBus:
    """Collects the broadcaster's reports; the engine emits them like its other events.

    They wait here because a report is made while the broadcaster is at work: emitting from within would be a circle.
    """

    def __init__(self) -> None:
        self.reports: deque[dict[str, Any]] = deque(maxlen=100)

    def inject(self, report: dict[str, Any]) -> None:
        """Takes one report."""
        self.reports.append(report)


@dataclass
class Watch:
    """How deep the spill became, and how long it took to empty it after the link was back."""

    deepest: int = 0
    longest_flush: float = 0.0
    _since: float | None = field(default=None, repr=False)
    _spilled: bool = field(default=False, repr=False)

    def look(self, depth: int, *, connected: bool, at: float) -> None:
        """Takes a sample."""
        self.deepest = max(self.deepest, depth)
        if not connected:
            self._since, self._spilled = None, self._spilled or depth > 0
        elif self._spilled:
            self._since = self._since or at
            if depth == 0:
                self.longest_flush = max(self.longest_flush, at - self._since)
                self._since, self._spilled = None, False


class Engine:
    """Walks ``modules`` again and again, and emits every node and edge with its own number.

    Args:
        broadcaster: Started; the engine emits in order and waits for each event to be accepted.
        citizen: Name of the engine.
        modules: Its part of the graph.
        known: All modules, by which imports are resolved.
        rate: Events a second.
        bus: Where the broadcaster's reports wait.
    """

    def __init__(
        self,
        broadcaster: SafeBroadcaster,
        citizen: str,
        modules: Mapping[str, Path],
        known: Mapping[str, Path],
        *,
        rate: float,
        bus: HealthBus,
    ) -> None:
        self.broadcaster = broadcaster
        self.citizen = citizen
        self.n = 0
        self.generation = 1
        self.nodes: set[str] = set()
        self.edges = 0
        self.skipped = 0
        self.watch = Watch()
        self._modules = modules
        self._known = known
        self._rate = rate
        self._bus = bus
        self._facts: dict[str, tuple[int, Facts | None]] = {}
        self._waiting = len(modules)
        self._last_tick = now()
        self._beat_due = monotonic()

    async def emit(self, kind: str, path: str, content: dict[str, Any]) -> None:
        """Emits one event with the next number."""
        self.n += 1
        event = {
            "type": kind,
            "topic": path,
            "content": {"citizen_id": self.citizen, "n": self.n, **content},
            "timestamp": now(),
        }
        await self.broadcaster.safe_emit(event)

    async def walk(self, stop: asyncio.Event) -> None:
        """Walks until ``stop`` is set; each walk over all modules is a generation."""
        pace = Pace(self._rate)
        while not stop.is_set():
            self._waiting = len(self._modules)
            for name, path in self._modules.items():
                facts = await self._read(name, path)
                self._waiting -= 1
                for part, content in self._describe(facts) if facts else ():
                    await self.emit(f"graph.delta.{part}.upsert", f"graph/{self.citizen}/delta/{part}", content)
                    await pace.turn()
                    await self._due()
                    if stop.is_set():
                        return
                self._last_tick = now()
            self.generation += 1
            await asyncio.sleep(0)

    async def observe(self) -> None:
        """Samples the spill until it is cancelled."""
        while True:
            stats = self.broadcaster.get_stats()
            self.watch.look(stats["current_spill_depth"], connected=self.broadcaster.connected, at=monotonic())
            await asyncio.sleep(WATCH)

    async def _read(self, name: str, path: Path) -> Facts | None:
        """Parses a file once, and again when it has changed."""
        changed = await asyncio.to_thread(_modified, path)
        known = self._facts.get(name)
        if known is None or known[0] != changed:
            facts = await asyncio.to_thread(read_module, name, path, self._known)
            known = self._facts[name] = (changed, facts)
            self.nodes.update([name, *(target for target, _ in facts.imports)] if facts else [])
            self.edges += len(facts.imports) if facts else 0
            self.skipped += facts is None
        return known[1]

    def _describe(self, facts: Facts) -> Iterator[tuple[str, dict[str, Any]]]:
        """A node for the module, an edge for each import, and a node for what is imported from outside of the graph."""
        yield (
            "node",
            {
                "id": facts.module,
                "kind": "package" if facts.is_package else "module",
                "lines": facts.lines,
                "classes": facts.classes,
                "functions": facts.functions,
                "generation": self.generation,
            },
        )
        for target, line in facts.imports:
            if target not in self._known:
                yield "node", {"id": target, "kind": "external", "generation": self.generation}
            yield (
                "edge",
                {
                    "id": f"{facts.module}->{target}",
                    "source": facts.module,
                    "target": target,
                    "line": line,
                    "generation": self.generation,
                },
            )

    async def _due(self) -> None:
        """Between two events: the heartbeat, and the reports that wait."""
        while self._bus.reports:
            report = self._bus.reports.popleft()
            await self.emit(report["type"], f"health/{self.citizen}/compliance/snapshot", report["content"])
        if monotonic() >= self._beat_due:
            self._beat_due = monotonic() + HEARTBEAT
            await self.emit("graph.delta.heartbeat", f"graph/{self.citizen}/delta/heartbeat", self._heartbeat())

    def _heartbeat(self) -> dict[str, Any]:
        stats = self.broadcaster.get_stats()
        return {
            "wm_size": self._waiting,
            "active_nodes": len(self.nodes),
            "energy_total": self.edges,
            "last_tick": self._last_tick,
            "interval": HEARTBEAT,
            "generation": self.generation,
            "skipped": self.skipped,
            "stats": {
                key: stats.get(key)
                for key in (
                    "emit_count",
                    "spill_count",
                    "flush_count",
                    "current_spill_depth",
                    "in_flight",
                    "reconnects",
                )
            },
        }

    def report(self, *, drained: bool) -> EngineReport:
        """What the engine says of itself."""
        return EngineReport(
            citizen=self.citizen,
            emitted=self.n,
            deepest_spill=self.watch.deepest,
            longest_flush=round(self.watch.longest_flush, 3),
            drained=drained,
            nodes=len(self.nodes),
            edges=self.edges,
            skipped=self.skipped,
            generation=self.generation,
        )


def _modified(path: Path) -> int:
    """When the file was changed; 0 where it is no more."""
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def say(state: str, **fields: Any) -> None:
    """One JSON line to the parent."""
    sys.stdout.buffer.write(orjson.dumps({"state": state, **fields}) + b"\n")
    sys.stdout.buffer.flush()


async def _status(engine: Engine) -> None:
    while True:
        stats = engine.broadcaster.get_stats()
        say(
            "running",
            n=engine.n,
            spill=stats["current_spill_depth"],
            connected=engine.broadcaster.connected,
            generation=engine.generation,
        )
        await asyncio.sleep(STATUS)


async def run(arguments: argparse.Namespace) -> None:
    """Starts the broadcaster, walks until the standard input ends, drains, and reports."""
    part, parts = (int(number) for number in arguments.part.split("/"))
    known = find_modules(library_roots())
    bus = HealthBus()
    broadcaster = SafeBroadcaster(
        arguments.url,
        spill_path=arguments.spill,
        health_bus=bus,
        durability="memory",
        emitter_id=arguments.citizen,
        backoff_initial=0.2,
        backoff_max=1.0,
    )
    modules = part_of(known, part, parts)
    engine = Engine(broadcaster, arguments.citizen, modules, known, rate=arguments.rate, bus=bus)
    stop = end_of_input()
    ending = asyncio.create_task(stop.wait())
    beside: list[asyncio.Task[Any]] = [ending, asyncio.create_task(engine.observe())]
    drained = False
    try:
        starting = asyncio.create_task(broadcaster.start())
        await asyncio.wait([starting, ending], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            say("ready", modules=len(modules))
            beside.append(asyncio.create_task(_status(engine)))
            await engine.walk(stop)
            drained = await broadcaster.drain(DRAIN_TIMEOUT)
        else:
            beside.append(starting)
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await broadcaster.stop(drain_timeout=0.0)
    say("ended", report=asdict(engine.report(drained=drained)))


def end_of_input() -> asyncio.Event:
    """Set when the standard input, a pipe, ends: the parent wants the end, or is no more."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def readable() -> None:
        if not os.read(sys.stdin.fileno(), 1024):
            loop.remove_reader(sys.stdin)
            ended.set()

    loop.add_reader(sys.stdin, readable)
    return ended


def main() -> None:
    """Entry point of ``python -m safe_broadcaster.demo.engine``."""
    parser = argparse.ArgumentParser(prog="python -m safe_broadcaster.demo.engine", description=__doc__)
    parser.add_argument("--url", required=True, help="the hub, ws://host:port/ws")
    parser.add_argument("--spill", required=True, help="path of the spill file")
    parser.add_argument("--citizen", required=True, help="name of this engine")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="walk the I-th of N parts (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1000.0, help="events a second (default: %(default)s)")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
