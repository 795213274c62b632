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

from safe_broadcaster.checks import check_choice, check_count, check_number
from safe_broadcaster.config import WhenFull
from safe_broadcaster.deadlines import end_tasks
from safe_broadcaster.exceptions import BroadcasterClosed, BroadcastError, QueueFull

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
        check_count("maxsize", maxsize)
        check_count("batch", batch)
        check_choice("when_full", when_full, get_args(WhenFull))
        check_number("linger", linger, 0, 3600)
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
        self._finished = 0
        """Items that were taken and are done with, in whatever way."""
        self._awake = self._closed = False
        self._dropped_lately = 0
        self._company: asyncio.Future[None] | None = None
        self._waiting_for_room: deque[concurrent.futures.Future[None]] = deque()
        self._waiting_for_end: list[tuple[int, concurrent.futures.Future[None]]] = []
        """Who waits until so many items are done with."""

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
            dropped = self._take_in(item)
        return self._told_of(dropped)

    async def put(self, item: T) -> bool:
        """Put an item, after waiting for room where ``when_full`` is ``wait``; else as `put_nowait`."""
        while True:
            with self._lock:
                if self._when_full != "wait" or self._closed or len(self._items) < self._maxsize:
                    dropped = self._take_in(item)
                    break
                turn: concurrent.futures.Future[None] = concurrent.futures.Future()
                self._waiting_for_room.append(turn)
            try:
                await asyncio.wrap_future(turn)
            except asyncio.CancelledError:
                with self._lock:
                    if turn in self._waiting_for_room:
                        self._waiting_for_room.remove(turn)
                    elif not turn.cancelled():
                        self._give_room(1)  # the place was this one's, and is another's now
                raise
        return self._told_of(dropped)

    async def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything that has been put so far is done with; False if not in time.

        Raises:
            BroadcastError: It is called by the consumer, which would wait for itself.

        """
        if self.task is not None and self.task is asyncio.current_task():
            raise BroadcastError(f"{self.name}: who consumes cannot wait for the end of it; return, and wait elsewhere")
        with self._lock:
            last = self._finished + len(self)
            if not self._awake:
                return not len(self)
            end: concurrent.futures.Future[None] = concurrent.futures.Future()
            self._waiting_for_end.append((last, end))
        try:
            await asyncio.wait({asyncio.wrap_future(end)}, timeout=timeout)
        finally:
            with self._lock:
                self._waiting_for_end = [each for each in self._waiting_for_end if each[1] is not end]
        return self._finished >= last

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
        if task is not None and not mine and await end_tasks([task], _GRACE):
            logger.error("%s: what consumes it does not let itself be cancelled", self.name)
        return left

    def _open_loop(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise BroadcasterClosed(f"{self.name} was stopped")
        loop = self._loop
        if loop is None or loop.is_closed():
            loop = self._loop = _running_loop()
            self._finish()  # what went on there is over
            self._awake, self.task, self._company = False, None, None
        if loop is None:
            raise BroadcastError(
                f"{self.name} has no event loop to run on: use it on a loop first, and then from other threads"
            )
        return loop

    def _take_in(self, item: T) -> tuple[int, T] | None:
        """Take an item; returns what was dropped for it, the oldest or the item itself, and how many were lately."""
        loop = self._open_loop()
        dropped: tuple[int, T] | None = None
        if len(self._items) >= self._maxsize:
            if self._when_full in {"raise", "wait"}:
                text = f"{self.name} is full: {self._maxsize} items wait; slow down, or give it a larger bound"
                raise QueueFull(text)
            self.dropped += 1
            self._dropped_lately += 1
            if self._when_full == "drop_newest":
                return self._dropped_lately, item
            dropped = self._dropped_lately, self._items.popleft()
            self._finished += 1
        self._items.append(item)
        self._wake(loop)
        return dropped

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        call_soon = loop.call_soon if loop is _running_loop() else loop.call_soon_threadsafe
        if not self._awake:
            self._awake = True
            call_soon(self._begin)
        elif self._company is not None and len(self._items) >= min(self._batch, self._maxsize):
            company, self._company = self._company, None
            call_soon(_settle, company)

    def _told_of(self, dropped: tuple[int, T] | None) -> bool:
        """Tell of what was dropped; returns whether the newest was taken."""
        if dropped is None:
            return True
        lately, item = dropped
        if lately == 1:
            logger.warning("%s is full, %d items wait: dropping (%s)", self.name, self._maxsize, self._when_full)
        elif str(lately).strip("0") == "1":  # a power of ten: told again and again, and never often
            logger.warning("%s is still full: %d items were dropped (%s)", self.name, lately, self._when_full)
        if self._on_drop is not None:
            self._on_drop(item)
        return self._when_full != "drop_newest"

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
                with self._lock:
                    self._finish()
                turns += 1
                if turns % _TURNS == 0:
                    await asyncio.sleep(0)
        except BaseException:  # cancelled, as everything is when a loop ends
            with self._lock:
                left, closed = len(self), self._closed
                self._finish()
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
        """Nothing is left to do, or nobody to do it; returns how many were dropped since there last was nothing."""
        self._awake, self.task = False, None
        dropped, self._dropped_lately = self._dropped_lately, 0
        for _, end in self._waiting_for_end:
            _ring(end)
        return dropped

    def _finish(self) -> None:
        """Be done with what the consumer had."""
        self._finished += self._busy
        self._busy = 0
        for last, end in self._waiting_for_end:
            if last <= self._finished:
                _ring(end)

    def _give_room(self, places: int) -> None:
        while places > 0 and self._waiting_for_room:
            places -= _ring(self._waiting_for_room.popleft())


def _ring(bell: concurrent.futures.Future[None]) -> bool:
    """Wake whoever waits; False if nobody does any more, which another thread may decide at any time."""
    try:
        bell.set_result(None)
    except concurrent.futures.InvalidStateError:
        return False
    return True


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _settle(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
