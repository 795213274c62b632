"""Sources that ask for a state again and again, and broadcast it when it has changed."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, Union, cast

from safe_broadcaster.calling import is_async, name_of
from safe_broadcaster.checks import check_number, check_seconds
from safe_broadcaster.deadlines import Aside, TimedOut, call_here, within
from safe_broadcaster.exceptions import ConfigError, SourceNotStarted
from safe_broadcaster.sources.conditions import Key, Memory, Significant
from safe_broadcaster.sources.source import Source, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from safe_broadcaster.sources.sink import Sink

__all__ = ["HybridSource", "Listening", "PollSource"]

logger = logging.getLogger("safe_broadcaster.sources")

Listening = Union[bool, Callable[[], object]]  # noqa: UP007 - evaluated, also by Python 3.10
"""Whether a source asks if somebody listens; a function answers in place of the WebSocket manager."""

F = TypeVar("F", bound="Callable[..., Awaitable[Any]]")

_FETCH: Any = object()
"""Stands for a state that is to be fetched, since None is what a handler returns that says nothing."""


class PollSource(Source):
    """Made by `safe_broadcaster.sources.poll` and `safe_broadcaster.sources.conditional`, which see."""

    def __init__(
        self,
        fetch: Callable[[], Any],
        *,
        every: float,
        event_type: str,
        key: Key,
        topic: str | None,
        name: str | None,
        timeout: float,
        minimum: float,
        listening: Listening = False,
        significant: Significant = None,
    ) -> None:
        if not callable(fetch):
            raise ConfigError(f"fetch={fetch!r} is not allowed: give a function, not what it returns")
        check_seconds("every", every)
        check_number("minimum", minimum, 0)
        if not every >= minimum:
            raise ConfigError(
                f"every={every!r} is not allowed: give at least {minimum:g} s. Use on_event or hybrid for what must be "
                f"known sooner, or allow it with minimum={every!r}"
            )
        if not (isinstance(listening, bool) or callable(listening)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"listening={listening!r} is not allowed: give True, False or a function")
        self._memory = Memory(key, significant)
        super().__init__(event_type, topic=topic, name=name or f"{event_type} ({name_of(fetch)})", timeout=timeout)
        self.every = every
        self.unchanged = 0
        """Rounds that found the state that was sent last."""
        self.insignificant = 0
        """Rounds that found one that differs too little."""
        self.unheard = 0
        """Rounds left out because nobody listens."""
        self._listening = listening
        # A plain function may block, as those of most database drivers do: not in the event loop.
        self._fetch_name = name_of(fetch)
        self._fetch = fetch if is_async(fetch) else Aside(fetch, f"fetch of {self.name}")
        self._sending = asyncio.Lock()
        self._wake = asyncio.Event()
        self._fetching: asyncio.Future[Any] | None = None
        self._home: asyncio.AbstractEventLoop | None = None

    def attach(self, sink: Sink) -> None:
        """See `Source.attach`."""
        if self._listening is True and not sink.can_tell_listeners():
            raise ConfigError(
                f"listening=True of source {self.name!r} is not allowed: {sink.target!r} cannot tell who listens; give "
                "a function that does, or False"
            )
        super().attach(sink)

    def begin(self) -> None:
        """See `Source.begin`."""
        loop = asyncio.get_running_loop()
        if self._home is not loop:  # they belong to the loop in which they were waited for
            self._sending, self._wake, self._fetching = asyncio.Lock(), asyncio.Event(), None
        self._home = loop
        super().begin()

    async def run(self) -> None:
        """Fetch and broadcast until cancelled."""
        while True:
            self._wake.clear()
            await self._round()
            await pause(self.every, self._wake)

    def status(self) -> dict[str, Any]:
        """Return its numbers."""
        more = {"unchanged": self.unchanged, "insignificant": self.insignificant, "unheard": self.unheard}
        return {**super().status(), "every": self.every, **more}

    async def _round(self) -> None:
        try:
            if not await within(self.timeout, self._is_heard()):
                self.unheard += 1
                return
            await self._offer(await self._fetched())
        except Exception as error:  # noqa: BLE001 - a source outlives whatever its functions raise
            self._failed(error)
        else:
            self._went_well()

    async def _fetched(self) -> object:
        if self._fetching is not None and not self._fetching.done():
            raise TimedOut("the fetch before does not heed its cancellation and has not ended yet")
        self._fetching = asyncio.ensure_future(call_here(self._fetch))
        return await within(self.timeout, self._fetching)

    async def _offer(self, state: object) -> bool:
        """Broadcast a state if it is worth it; None is no state."""
        if state is None:
            return False
        async with self._sending:
            seen = self._memory.look(state)
            if not self._memory.is_changed(seen):
                self.unchanged += 1
                return False
            if not self._memory.is_significant(seen):
                self.insignificant += 1
                return False
            await self._broadcast(state)
            self._memory.keep(seen)
            return True

    async def _is_heard(self) -> bool:
        if callable(self._listening):
            return bool(await call_here(self._listening))
        return not self._listening or self._sink is None or await self._sink.is_heard()

    def _hint(self) -> str:
        return f"{self._fetch_name} returned None each time; let it return the state"


class HybridSource(PollSource):
    """Made by `safe_broadcaster.sources.hybrid`, which see."""

    def __init__(self, fetch: Callable[[], Any], **settings: Any) -> None:
        super().__init__(fetch, **settings)
        self.events = 0
        """Events that were told."""
        self._told = 0
        self._waiting: list[asyncio.Future[None]] = []

    async def notify(self, state: Any = _FETCH) -> None:
        """Tell that something has happened; returns when it is broadcast, or found to be no news.

        May be called in any event loop.

        Args:
            state: The state now, broadcast at once unless it is the one that was sent last. Left out: it is fetched at
                once; many calls while a fetch is under way share the next one.

        Raises:
            SourceNotStarted: The source does not run.
            Exception: What broadcasting raised; what a fetch raises is logged only. Polling goes on in any case.

        """
        if self.state != "running" or self._home is None or self._home.is_closed():
            raise SourceNotStarted(f"source {self.name!r} does not run: give it to BackgroundTasks, and start those")
        if self._home is asyncio.get_running_loop():
            await self._hear(state)
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._hear(state), self._home))

    async def _hear(self, state: Any) -> None:
        self.events += 1
        if state is not _FETCH:
            self._told += 1
            await self._offer(state)
            return
        fetched: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(fetched)
        self._wake.set()
        await fetched

    def on_event(self, function: F) -> F:
        """Decorate an async event handler: what it returns is told as the state now; None has the state fetched."""
        if not is_async(function):
            raise ConfigError(f"function={name_of(function)} is not allowed: give an async one, which can broadcast")
        source = self

        async def handler(*args: Any, **kwargs: Any) -> Any:
            result = await function(*args, **kwargs)
            try:
                await source.notify(_FETCH if result is None else result)
            except SourceNotStarted:
                raise
            except Exception as error:  # noqa: BLE001 - the poll is the safety net
                source._failed(error)
            return result

        return cast("F", functools.wraps(function)(handler))

    def end(self) -> None:
        """See `Source.end`."""
        super().end()
        self._answer(self._waiting)

    async def _round(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            await super()._round()
        finally:
            self._answer(waiting)

    async def _fetched(self) -> object:
        for _ in range(2):
            told = self._told
            state = await super()._fetched()
            if told == self._told:
                return state
            # An event overtook the fetch, whose state may be older than the event's: ask once more.
        return None

    def _answer(self, waiting: list[asyncio.Future[None]]) -> None:
        for each in waiting:
            if not each.done():
                each.set_result(None)
        waiting.clear()

    def status(self) -> dict[str, Any]:
        """Return its numbers."""
        return {**super().status(), "events": self.events}
