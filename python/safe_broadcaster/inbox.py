"""Items that wait for one consumer: bounded, in order, and consumed in a task that lives while there are any.

So nothing has to be started, an idle inbox costs no task, and whoever puts never waits unless it asked to.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar, get_args

from safe_broadcaster.config import WhenFull
from safe_broadcaster.exceptions import BroadcasterClosed, BroadcastError, ConfigError, QueueFull

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Inbox"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

_TURNS = 64
"""Batches after which others get their turn on the loop, if the consumer never waits for anything."""

_GRACE = 1.0
"""Seconds that a cancelled consumer has to end."""


class Inbox(Generic[T]):
    """See the module. Items may be put from any thread; they are consumed on one loop.

    That is the loop that was running when it was made, else the first on which something was put; when that loop is
    closed, the next one.

    Args:
        consume: Takes a list of items, oldest first. What it raises is logged, and the next ones follow.
        maxsize: Most items that wait; those that ``consume`` has are not counted.
        when_full: What happens at that bound. ``wait`` holds up `put`.
        name: For people who read logs.
        batch: Most items handed over at once.
        linger: Seconds that the first item of a batch waits for company.
        on_drop: Called for each item that is dropped, by whoever puts.

    Raises:
        ConfigError: A setting has a value that is not allowed.

    """

    def __init__(
        self,
        consume: Callable[[list[T]], Awaitable[object]],
        *,
        maxsize: int,
        when_full: WhenFull = "drop_oldest",
        name: str,
        batch: int = 1,
        linger: float = 0.0,
        on_drop: Callable[[T], object] | None = None,
    ) -> None:
        _check(maxsize=maxsize, when_full=when_full, batch=batch, linger=linger)
        self.name = name
        self.dropped = 0
        """Items that were dropped at the bound."""
        self.task: asyncio.Task[None] | None = None
        """The one that consumes, while there is something to consume."""
        self._consume = consume
        self._maxsize = maxsize
        self._when_full: WhenFull = when_full
        self._batch = batch
        self._linger = linger
        self._on_drop = on_drop
        self._loop = _running_loop()
        self._lock = threading.Lock()
        self._items: deque[T] = deque()
        self._busy = 0
        self._awake = self._closed = False
        self._dropped_lately = 0
        self._company: asyncio.Future[None] | None = None
        self._waiting_for_room: deque[concurrent.futures.Future[None]] = deque()
        self._waiting_for_end: list[concurrent.futures.Future[None]] = []

    def __len__(self) -> int:
        """Return how many items are not done with: those that wait and those being consumed."""
        return len(self._items) + self._busy

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._items)

    def put_nowait(self, item: T) -> bool:
        """Put an item; False if it was dropped itself (``drop_newest``).

        Raises:
            QueueFull: It is full and ``when_full`` is ``raise``, or ``wait``, which only `put` can.
            BroadcasterClosed: It was closed.
            BroadcastError: It is put by a thread, and there was no event loop yet to consume it on.

        """
        with self._lock:
            loop = self._open_loop()
            dropped = self._make_room(item)
            taken = not dropped or self._when_full != "drop_newest"
            if taken:
                self._items.append(item)
                self._wake(loop)
        for each in dropped:
            self._tell_of(each)
        return taken

    async def put(self, item: T) -> bool:
        """Put an item, after waiting for room where ``when_full`` is ``wait``; else as `put_nowait`."""
        while True:
            with self._lock:
                if self._when_full != "wait" or self._closed or len(self._items) < self._maxsize:
                    break
                turn: concurrent.futures.Future[None] = concurrent.futures.Future()
                self._waiting_for_room.append(turn)
            try:
                await asyncio.wrap_future(turn)
            except asyncio.CancelledError:
                with self._lock:
                    if turn in self._waiting_for_room:
                        self._waiting_for_room.remove(turn)
                    else:
                        self._give_room(1)  # the place was this one's, and is another's now
                raise
        return self.put_nowait(item)

    async def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything is done with; False if not in time.

        Raises:
            BroadcastError: It is called by the consumer, which would wait for itself.

        """
        if self.task is not None and self.task is asyncio.current_task():
            raise BroadcastError(f"{self.name}: who consumes cannot wait for the end of it; return, and wait elsewhere")
        with self._lock:
            if not self._awake:
                return not len(self)
            end: concurrent.futures.Future[None] = concurrent.futures.Future()
            self._waiting_for_end.append(end)
        await asyncio.wait({asyncio.wrap_future(end)}, timeout=timeout)
        return not len(self)

    async def close(self, drain_timeout: float = 0.0) -> int:
        """Take nothing more, consume for at most so many seconds, and return how many items are left undone."""
        with self._lock:
            self._closed = True
            self._give_room(len(self._waiting_for_room))
        mine = self.task is asyncio.current_task()
        if drain_timeout > 0 and not mine:
            await self.drain(drain_timeout)
        with self._lock:
            left, task = len(self), self.task
            self._items.clear()
        if task is not None and not mine:
            await self._end(task)
        return left

    async def _end(self, task: asyncio.Task[None]) -> None:
        loop = task.get_loop()
        if loop is asyncio.get_running_loop():
            task.cancel()
            _, undone = await asyncio.wait({task}, timeout=_GRACE)
            if undone:
                logger.error("%s: what consumes it does not let itself be cancelled", self.name)
        elif not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)

    def _open_loop(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise BroadcasterClosed(f"{self.name} was stopped")
        loop = self._loop
        if loop is None or loop.is_closed():
            loop = self._loop = _running_loop()
            self._awake, self._busy, self.task, self._company = False, 0, None, None  # what went on there is over
        if loop is None:
            raise BroadcastError(
                f"{self.name} has no event loop to run on: use it on a loop first, and then from other threads"
            )
        return loop

    def _make_room(self, item: T) -> list[T]:
        """Return what was dropped: nothing, the oldest, or the item itself."""
        if len(self._items) < self._maxsize:
            return []
        if self._when_full in {"raise", "wait"}:
            raise QueueFull(f"{self.name} is full: {self._maxsize} items wait; slow down, or give it a larger bound")
        self.dropped += 1
        self._dropped_lately += 1
        return [item if self._when_full == "drop_newest" else self._items.popleft()]

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        call_soon = loop.call_soon if loop is _running_loop() else loop.call_soon_threadsafe
        if not self._awake:
            self._awake = True
            call_soon(self._begin)
        elif self._company is not None and len(self._items) >= min(self._batch, self._maxsize):
            company, self._company = self._company, None
            call_soon(_settle, company)

    def _tell_of(self, dropped: T) -> None:
        if self._dropped_lately == 1:
            logger.warning("%s is full, %d items wait: dropping (%s)", self.name, self._maxsize, self._when_full)
        if self._on_drop is not None:
            self._on_drop(dropped)

    def _begin(self) -> None:
        task = asyncio.get_running_loop().create_task(self._run(), name=f"safe_broadcaster {self.name}")
        if not task.done():  # where tasks are eager it may be
            self.task = task

    async def _run(self) -> None:
        turns = 0
        try:
            while items := await self._take():
                try:
                    await self._consume(items)
                except Exception:
                    logger.exception("%s: what consumes it failed", self.name)
                turns += 1
                if turns % _TURNS == 0:
                    await asyncio.sleep(0)
        except BaseException:  # cancelled, as everything is when a loop ends
            with self._lock:
                left, closed = len(self), self._closed
                self._rest()
            if left and not closed:
                logger.error("%s was cancelled while %d items were not done with", self.name, left)  # noqa: TRY400 - no error of ours
            raise

    async def _take(self) -> list[T]:
        """Take what comes next; nothing when there is nothing."""
        if self._linger > 0:
            await self._wait_for_company()
        with self._lock:
            items = [self._items.popleft() for _ in range(min(self._batch, len(self._items)))]
            self._busy = len(items)
            if items:
                self._give_room(self._maxsize - len(self._items))
                return items
            dropped = self._rest()
        if dropped:
            logger.warning("%s has room again: %d items were dropped", self.name, dropped)
        return items

    async def _wait_for_company(self) -> None:
        with self._lock:
            if not self._items or len(self._items) >= min(self._batch, self._maxsize) or self._closed:
                return
            self._company = company = asyncio.get_running_loop().create_future()
        await asyncio.wait({company}, timeout=self._linger)
        with self._lock:
            self._company = None

    def _rest(self) -> int:
        """Nothing is left to do; returns how many were dropped since there last was nothing."""
        self._busy, self._awake, self.task = 0, False, None
        dropped, self._dropped_lately = self._dropped_lately, 0
        ends, self._waiting_for_end = self._waiting_for_end, []
        for end in ends:
            if not end.done():
                end.set_result(None)
        return dropped

    def _give_room(self, places: int) -> None:
        for _ in range(min(places, len(self._waiting_for_room))):
            turn = self._waiting_for_room.popleft()
            if not turn.done():
                turn.set_result(None)


def _check(*, maxsize: int, when_full: WhenFull, batch: int, linger: float) -> None:
    for setting, value in {"maxsize": maxsize, "batch": batch}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"{setting}={value!r} is not allowed: give a whole number, at least 1")
    if when_full not in get_args(WhenFull):
        allowed = ", ".join(map(repr, get_args(WhenFull)))
        raise ConfigError(f"when_full={when_full!r} is not allowed: give one of {allowed}")
    if not (isinstance(linger, (int, float)) and 0 <= linger < float("inf")):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"linger={linger!r} is not allowed: give seconds, at least 0")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _settle(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
