"""Runs the demo: starts everything, kills the hub twice, watches, and ends with the verdict."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import orjson

from safe_broadcaster.demo.processes import DemoError, EngineProcess, HubProcess, choose_port
from safe_broadcaster.demo.subscriber import Subscriber
from safe_broadcaster.demo.terminal import Screen, table
from safe_broadcaster.demo.verdict import Tally, Verdict, judge

__all__ = ["Options", "Show", "show"]

CITIZENS = ("ada-architect", "atlas-infrastructure", "felix-substrate")
LONGEST_DOWN = 3.0
READY_TIMEOUT = 60.0
END_TIMEOUT = 40.0
QUIET = 5.0
"""Seconds without a delivery after which what is missing is lost."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    seconds: float = 40.0
    rate: float = 1000.0
    port: int | None = None
    keep: bool = False
    as_json: bool = False


def show(options: Options) -> int:
    """Runs the demo; 0 where every promise was kept, 1 otherwise.

    Raises:
        DemoError: It could not be run to its end.
    """
    with TemporaryDirectory(prefix="safe-broadcaster-demo-") as folder:
        verdict = asyncio.run(Show(options, Path(folder)).run())
    if options.as_json:
        sys.stdout.buffer.write(orjson.dumps(verdict.as_dict(), option=orjson.OPT_INDENT_2) + b"\n")
    else:
        sys.stdout.write(table(verdict) + "\n")
    sys.stdout.flush()
    return 0 if verdict.ok else 1


class Show:
    """One run of the demo. ``folder`` holds the spill files and logs, and is the caller's to remove."""

    def __init__(self, options: Options, folder: Path) -> None:
        self._options = options
        self._screen = Screen(silent=options.as_json)
        self._tally = Tally()
        self._hub = HubProcess(folder, choose_port(options.port))
        self._subscriber = Subscriber(self._hub.url, self._tally.see)
        self._engines = [
            EngineProcess(folder, citizen, self._hub.url, part=f"{part}/{len(CITIZENS)}", rate=options.rate)
            for part, citizen in enumerate(CITIZENS)
        ]
        self._kills = 0
        self._hub_is_down = False
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> Verdict:
        """Everything from the first process to the verdict; leaves no process behind, however it ends."""
        self._take_signals()
        try:
            await self._boot()
            await self._watch()
            return await self._finish()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*(child.end() for child in (*self._engines, self._hub)))

    def _take_signals(self) -> None:
        """The first Ctrl-C or SIGTERM ends the run with its verdict, the second at once."""
        loop, current = asyncio.get_running_loop(), asyncio.current_task()

        def asked() -> None:
            if self._stop.is_set() and current is not None:
                current.cancel()
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked)

    async def _boot(self) -> None:
        """In the order of dependence: the hub, who listens, who speaks."""
        self._screen.line(f"hub        {self._hub.url}")
        await self._hub.boot()
        self._screen.line(f"dashboard  {self._hub.page}")
        self._tasks.append(asyncio.create_task(self._subscriber.run()))
        await self._until(self._subscriber.connected, "the subscriber is not connected")
        self._screen.line(f"engines    {', '.join(CITIZENS)}: the import graph of {sys.prefix}")
        self._tasks += [asyncio.create_task(engine.follow()) for engine in self._engines]
        for engine in self._engines:
            await self._until(engine.ready, f"{engine.name} is not ready")
            if not engine.running:
                raise DemoError(f"{engine.name} ended at once: {engine.why()}")

    async def _until(self, event: asyncio.Event, complaint: str) -> None:
        try:
            await asyncio.wait_for(event.wait(), READY_TIMEOUT)
        except asyncio.TimeoutError:
            raise DemoError(f"{complaint} after {READY_TIMEOUT:.0f} s") from None

    async def _watch(self) -> None:
        """A status line every second, and the two kills at a third and at two thirds of the time."""
        began = monotonic()
        seconds = self._options.seconds
        killing = asyncio.create_task(self._kill_twice(seconds))
        self._tasks.append(killing)
        while not self._stop.is_set() and (self._options.keep or monotonic() - began < seconds):
            self._check()
            self._screen.status(self._status(monotonic() - began))
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), min(1.0, seconds / 10))
        self._stop.set()
        await killing

    async def _kill_twice(self, seconds: float) -> None:
        down = min(LONGEST_DOWN, seconds / 8)
        began = monotonic()
        for third in (1, 2):
            if await self._stopped_within(began + seconds * third / 3 - monotonic()):
                return
            self._hub_is_down = True
            self._screen.line(f"SIGKILL    the hub is gone for {down:.1f} s; the engines go on")
            await self._hub.kill()
            self._kills += 1
            await self._stopped_within(down)
            await self._hub.boot()
            self._hub_is_down = False
            self._screen.line("hub        is back on the same port, with the log that it had")

    async def _stopped_within(self, seconds: float) -> bool:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        return self._stop.is_set()

    def _check(self) -> None:
        """Whatever failed beside us is told now, not at the end."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()
        if not self._hub_is_down and not self._hub.running:
            raise DemoError(f"the hub ended by itself: {self._hub.why()}")
        for engine in self._engines:
            if not engine.running:
                raise DemoError(f"{engine.name} ended by itself: {engine.why()}")

    def _status(self, elapsed: float) -> str:
        # What an engine says of itself is a moment old; what has arrived was emitted.
        emitted = max(sum(engine.emitted for engine in self._engines), self._tally.delivered)
        spill = "/".join(f"{engine.spill:,}" for engine in self._engines)
        return (
            f"{elapsed:5.0f} s    hub {'DOWN' if self._hub_is_down else 'up  '}  emitted {emitted:>9,}  "
            f"delivered {self._tally.delivered:>9,}  spill {spill}  "
            f"duplicated {self._tally.duplicates}  out of order {self._tally.out_of_order}"
        )

    async def _finish(self) -> Verdict:
        """Lets the engines drain, and the subscriber receive what is still on its way."""
        self._screen.line("the engines drain")
        for engine in self._engines:
            engine.close_input()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(engine.ended.wait() for engine in self._engines)), END_TIMEOUT)
        reports = {engine.name: engine.report for engine in self._engines}
        emitted = {name: report.emitted for name, report in reports.items() if report is not None}
        seen, since = self._tally.delivered, monotonic()
        while self._tally.lost(emitted) and monotonic() - since < QUIET:
            await asyncio.sleep(0.05)
            if self._tally.delivered != seen:
                seen, since = self._tally.delivered, monotonic()
        return judge(self._tally, reports, hub_kills=self._kills)
