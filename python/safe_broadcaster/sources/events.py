"""Sources that broadcast when something happens: what a handler returns goes out at once."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from safe_broadcaster.calling import is_async, name_of
from safe_broadcaster.checks import check_choice, check_count
from safe_broadcaster.exceptions import ConfigError, SourceNotStarted
from safe_broadcaster.sources.sink import Sink
from safe_broadcaster.sources.source import Source

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Errors", "EventSource", "WhenFull"]

logger = logging.getLogger("safe_broadcaster.sources")

F = TypeVar("F", bound="Callable[..., Any]")

Errors = Literal["log", "raise"]
"""What becomes of an exception: it is logged and the handler returns None, or its caller gets it."""

WhenFull = Literal["drop_newest", "raise"]
"""What happens when too many results of plain handlers wait: the newest is dropped and logged, or `BufferError`."""

_FLOOD = 100
"""Events of one source in a second from which on it is told that it floods: nobody reads more on a dashboard."""

_FLOOD_AGAIN = 60.0
"""Seconds until it is told again."""


class EventSource(Source):
    """Made by `safe_broadcaster.sources.on_event`, which see."""

    def __init__(
        self,
        event_type: str,
        *,
        to: object,
        topic: str | None,
        name: str | None,
        timeout: float,
        errors: Errors,
        max_waiting: int,
        when_full: WhenFull,
    ) -> None:
        check_choice("errors", errors, get_args(Errors))
        check_choice("when_full", when_full, get_args(WhenFull))
        check_count("max_waiting", max_waiting)
        sink = None if to is None else Sink(to)
        super().__init__(event_type, topic=topic, name=name or event_type, timeout=timeout)
        self._is_named = name is not None
        self.dropped = 0
        """Results that were not broadcast: too many of them waited, or the source was stopped."""
        self._errors: Errors = errors
        self._when_full: WhenFull = when_full
        self._max_waiting = max_waiting
        self._waiting: collections.deque[object] = collections.deque()
        self._bell = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._direct = sink is not None
        self._second = (0, 0)
        self._flood_told = -_FLOOD_AGAIN
        if sink is not None:
            self.attach(sink)
            self.state = "running"

    def wrap(self, function: F) -> F:
        """Return the handler that broadcasts what the function returns."""
        if not self._is_named:
            self.name = f"{self.event_type} ({name_of(function)})"
        if is_async(function):
            handler = self._async_handler(function)
        elif self._direct:
            raise ConfigError(
                f"to= is not allowed for {name_of(function)}, which is no async function and cannot wait for a "
                "broadcast: make it async, or leave 'to' out and give it to BackgroundTasks"
            )
        else:
            handler = self._plain_handler(function)
        wrapped: Any = functools.wraps(function)(handler)
        wrapped.source = self
        return cast("F", wrapped)

    def begin(self) -> None:
        """See `Source.begin`."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # the bell belongs to the loop in which it was waited for
            self._bell = asyncio.Event()
        self._loop = loop
        super().begin()

    async def run(self) -> None:
        """Broadcast what plain handlers return, in order, until cancelled."""
        while True:
            while self._waiting:
                result = self._waiting.popleft()
                try:
                    await self._tell(result)
                except Exception as error:  # noqa: BLE001 - a source outlives whatever its manager raises
                    self._failed(error)
                except BaseException:  # cancelled
                    self._waiting.appendleft(result)
                    raise
            self._bell.clear()
            if not self._waiting:
                await self._bell.wait()

    def end(self) -> None:
        """See `Source.end`."""
        super().end()
        if self._waiting:  # they would be old news at the next start
            self.dropped += len(self._waiting)
            logger.error("source %s was stopped: %d results are not broadcast", self.name, len(self._waiting))
            self._waiting.clear()

    def status(self) -> dict[str, Any]:
        """Return its numbers."""
        return {**super().status(), "waiting": len(self._waiting), "dropped": self.dropped}

    def _async_handler(self, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def handler(*args: Any, **kwargs: Any) -> Any:
            self._check()
            try:
                result = await function(*args, **kwargs)
                await self._tell(result)
            except Exception as error:
                self._failed(error)
                if self._errors == "raise":
                    raise
                return None
            return result

        return handler

    def _plain_handler(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def handler(*args: Any, **kwargs: Any) -> Any:
            self._check()
            try:
                result = function(*args, **kwargs)
                self._put(result)
            except Exception as error:
                self._failed(error)
                if self._errors == "raise":
                    raise
                return None
            return result

        return handler

    async def _tell(self, result: object) -> None:
        if result is not None:
            if self._is_stopped():
                return
            self._watch()
            await self._broadcast(result)
        self._went_well()

    def _put(self, result: object) -> None:
        """Have the result of a plain handler broadcast, from whichever thread it runs in."""
        if result is not None and self._is_stopped():
            return
        if len(self._waiting) >= self._max_waiting:
            self.dropped += 1
            full = f"{self._max_waiting} results of {self.name} wait to be broadcast"
            if self._when_full == "raise":
                raise BufferError(f"{full}; this one is refused")
            logger.error("%s; the newest is dropped (%d so far)", full, self.dropped)
            return
        self._waiting.append(result)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the source was stopped
                self._loop.call_soon_threadsafe(self._bell.set)

    def _is_stopped(self) -> bool:
        if self.state == "stopped":
            self.dropped += 1
            logger.warning("source %s was stopped: an event is not broadcast", self.name)
        return self.state == "stopped"

    def _check(self) -> None:
        if self.state == "new":
            raise SourceNotStarted(
                f"source {self.name!r} was never started: give it to BackgroundTasks and start those, or say where it "
                "broadcasts to with to="
            )

    def _watch(self) -> None:
        """Tell of a flood."""
        now = asyncio.get_running_loop().time()
        second, count = self._second
        self._second = (int(now), count + 1 if int(now) == second else 1)
        if self._second[1] > _FLOOD and now - self._flood_told >= _FLOOD_AGAIN:
            self._flood_told = now
            logger.warning(
                "source %s floods: more than %d events in a second. Let hybrid or conditional send the state instead",
                self.name,
                _FLOOD,
            )

    def _hint(self) -> str:
        return "its handler returned None each time; let it return what is to be broadcast"
