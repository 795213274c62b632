"""The engine that is killed: emits, and tells through a pipe which calls have returned.

A process of its own, started ahead of its time: it has imported everything and waits for its orders, one line of JSON,
so that a kill a microsecond after them meets a broadcaster that starts and not an interpreter that does.
What it says, a line each: a number whose emit has returned · ``opened`` · ``stopping`` · ``stopped {stats}``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from chaos.events import SPAN, event
from safe_broadcaster import BroadcasterClosed, SafeBroadcaster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.levels import Level

__all__ = ["LANES", "Orders", "Style"]

LANES = 4
"""Lanes set apart for each life."""

WINDOW = 64
"""Awaits under way at once where tasks emit."""

_PAUSE_EVERY = 50
"""A loop that emits without a pause lets others run after so many events."""

Style = Literal["one", "tasks", "threads"]


@dataclass(frozen=True)
class Orders:
    """What a life of an engine is to do."""

    url: str
    spill_path: str
    name: str
    level: Level
    lane: int
    """The first of its lanes."""
    style: Style
    """``one``: one task awaits each event. ``tasks``: many do. ``threads``: `LANES` threads without a loop."""
    early: int
    """So many events before the broadcaster is started."""
    limit: int
    """Most events of a lane; then it idles."""
    pause: float
    """Seconds between two events of a lane."""
    stop_after: float | None
    """Stop in order after so many seconds; None: work until killed."""
    finish: bool
    """Wait until everything is confirmed before stopping."""
    settings: dict[str, Any]

    @property
    def lanes(self) -> range:
        """The lanes that it uses."""
        return range(self.lane, self.lane + (LANES if self.style == "threads" else 1))

    @property
    def window(self) -> int:
        """How many events of a lane may have been emitted without having returned."""
        return WINDOW if self.style == "tasks" else 1


def say(line: bytes) -> None:
    """One write, unbuffered: what the pipe has survives the kill, and a line is never torn (PIPE_BUF)."""
    os.write(1, line + b"\n")


class _Engine(SafeBroadcaster):
    """A broadcaster whose callers tell what has returned."""

    opened = False

    def returned(self, n: int) -> None:
        """Tell that the emit of this number has returned, and first of all whether the spill is open."""
        self._look()
        say(b"%d" % n)

    async def watch(self) -> None:
        """Tell that the spill is open even if nothing is emitted any more."""
        while not self.opened:
            self._look()
            await asyncio.sleep(0.002)

    def _look(self) -> None:
        if not self.opened and self.get_stats()["epoch"] is not None:
            self.opened = True
            say(b"opened")


async def work(orders: Orders) -> None:
    """Live until killed, or to the end of the orders."""
    broadcaster = _Engine(
        orders.url, orders.spill_path, emitter_id=orders.name, durability=orders.level, **orders.settings
    )
    numbers = iter(range(orders.lane * SPAN, orders.lane * SPAN + orders.limit))
    for n in (next(numbers) for _ in range(orders.early)):
        broadcaster.emit_nowait(event(n), durability="memory")  # a stronger level would wait for the start
        if orders.level == "memory":
            broadcaster.returned(n)
    starting = asyncio.create_task(broadcaster.start())
    watching = asyncio.create_task(broadcaster.watch())
    emitting = [asyncio.create_task(_emit(broadcaster, orders, numbers, each)) for each in range(_tasks(orders))]
    if orders.stop_after is None and not orders.finish:
        await asyncio.gather(starting, *emitting)
        await asyncio.Event().wait()
    if orders.finish:
        await asyncio.gather(starting, *emitting)
        await broadcaster.drain()
        await _emptied(broadcaster)
    else:
        await asyncio.sleep(orders.stop_after or 0.0)
    stats = broadcaster.get_stats()
    say(b"stopping")
    await broadcaster.stop(0.3)
    await asyncio.gather(*emitting)
    watching.cancel()
    with suppress(BroadcasterClosed):  # it was stopped before there was a link
        await starting
    say(b"stopped " + orjson.dumps(stats))


async def _emptied(broadcaster: _Engine) -> None:
    """Wait until the file is empty, too; not for ever, since the numbers tell."""
    for _ in range(500):
        if not broadcaster.get_stats()["spill_bytes"]:
            return
        await asyncio.sleep(0.01)


def _tasks(orders: Orders) -> int:
    return {"one": 1, "tasks": WINDOW, "threads": LANES}[orders.style]


async def _emit(broadcaster: _Engine, orders: Orders, numbers: Iterator[int], lane: int) -> None:
    try:
        if orders.style == "threads":
            first = (orders.lane + lane) * SPAN
            mine = numbers if lane == 0 else iter(range(first, first + orders.limit))
            await asyncio.to_thread(_emit_in_thread, broadcaster, orders, mine)
            return
        for n in numbers:  # shared by all tasks: taking a number and emitting it is one step
            await broadcaster.safe_emit(event(n))
            broadcaster.returned(n)
            if orders.pause or n % _PAUSE_EVERY == 0:
                await asyncio.sleep(orders.pause)
    except BroadcasterClosed:
        pass  # it did not return


def _emit_in_thread(broadcaster: _Engine, orders: Orders, numbers: Iterator[int]) -> None:
    pause = threading.Event()
    for n in numbers:
        broadcaster.emit_nowait(event(n))
        broadcaster.returned(n)
        if orders.pause:
            pause.wait(orders.pause)


def _die_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(3)


def main() -> None:
    """Wait for orders, then work."""
    logging.getLogger("safe_broadcaster").setLevel(logging.ERROR)  # lost links are no news here
    line = sys.stdin.buffer.readline()
    if line:
        threading.Thread(target=_die_with_parent, daemon=True).start()
        asyncio.run(work(Orders(**orjson.loads(line))))
        os._exit(0)  # the thread above reads for ever


if __name__ == "__main__":
    main()
