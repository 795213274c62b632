"""Starts sources, looks after them, and stops them.

::

    tasks = BackgroundTasks(hub)
    tasks.add(sources.poll(read_status, every=5.0, event_type="status_update"))
    async with tasks:
        ...
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import TYPE_CHECKING, Any, TypeVar, cast

from safe_broadcaster.calling import is_async, name_of
from safe_broadcaster.deadlines import end_tasks, is_alive
from safe_broadcaster.exceptions import ConfigError
from safe_broadcaster.metrics import Metric
from safe_broadcaster.sources.sink import Sink
from safe_broadcaster.sources.source import Source, stray_sources

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["BackgroundTasks", "LoopSource"]

logger = logging.getLogger("safe_broadcaster.sources")

S = TypeVar("S")

_RESTART_AFTER = 5.0
"""Seconds until a source that has ended is started again: the pause of seed 004 after an error."""

_STOP_GRACE = 5.0
"""Seconds that a source may take to end when it is stopped."""

_STRAY_AFTER = 5.0
"""Seconds after a start until sources are looked for that nobody has been given: by then a program is up."""


class LoopSource(Source):
    """A coroutine function of the user's with a loop of its own, as ``_broadcast_…`` in seed 004.

    It broadcasts by itself; looked after is that it runs.
    """

    def __init__(self, function: Callable[[], Awaitable[Any]]) -> None:
        name = name_of(function)
        super().__init__(name, topic=None, name=name, timeout=_STOP_GRACE)
        self._function = function

    async def run(self) -> None:
        """Run it once."""
        await self._function()


class BackgroundTasks:
    """Runs sources on one WebSocket manager, each in a task of its own that is started again if it ends.

    A subclass may have methods ``async def _broadcast_…(self)`` with loops of their own: they are started too, so none
    can be forgotten.

    Args:
        websocket_manager: Where sources broadcast to: a hub, a `SafeBroadcaster`, or an object with
            ``broadcast(message)``, async or plain.

    Raises:
        ConfigError: It is none of these.

    """

    def __init__(self, websocket_manager: object) -> None:
        self.websocket_manager = websocket_manager
        self._sources: list[Source] = []
        self._tasks: dict[asyncio.Task[None], Source] = {}
        self._running = False
        self._stray_check: asyncio.TimerHandle | None = None
        self._sink_made: Sink | None = None
        self._sink()  # refuses what is none
        for name, _ in inspect.getmembers(type(self), inspect.iscoroutinefunction):
            if name.startswith("_broadcast_"):
                self.add(getattr(self, name))

    def add(self, source: S) -> S:
        """Take a source, and start it if the others run already.

        Args:
            source: What `safe_broadcaster.sources` makes, a handler decorated with ``on_event``, or an async function
                without arguments that has a loop of its own.

        Returns:
            The same.

        Raises:
            ConfigError: It is none of these, or belongs to somebody already.

        """
        found: object = getattr(source, "source", source)
        if not isinstance(found, Source):
            if not is_async(found):
                raise ConfigError(
                    f"source={source!r} is not allowed: give what sources.poll, on_event, hybrid or conditional make, "
                    "or an async function without arguments"
                )
            found = LoopSource(cast("Callable[[], Awaitable[Any]]", found))
        found.attach(self._sink())
        self._sources.append(found)
        if self._running:
            self._begin(found)
        return source

    async def start(self) -> None:
        """Start all sources, in tasks of the running loop. Starting running ones does nothing.

        Those whose loop has ended without a `stop` do not run any more, and are started.
        """
        self._tasks = {task: source for task, source in self._tasks.items() if is_alive(task)}
        if self._running and (self._tasks or not self._sources):
            return
        self._running = True
        for source in self._sources:
            self._begin(source)
        self._stray_check = asyncio.get_running_loop().call_later(_STRAY_AFTER, _tell_strays)

    async def stop(self) -> None:
        """Stop all sources. Not started is fine. To be called in the loop in which they were started."""
        self._running = False
        if self._stray_check is not None:
            self._stray_check.cancel()
        tasks = dict(self._tasks)
        for task in await end_tasks(tasks, _STOP_GRACE + 1):
            logger.error("source %s does not heed its end", tasks[task].name)
        for source in self._sources:
            if source.state == "running":
                source.end()

    def status(self) -> list[dict[str, Any]]:
        """Return the numbers of each source, see `Source.status`."""
        return [source.status() for source in self._sources]

    def metrics(self) -> Iterator[Metric]:
        """Yield the numbers for `safe_broadcaster.export`, by the name of the source; those of one name together."""
        by_name: dict[str, list[Source]] = {}
        for source in self._sources:
            by_name.setdefault(source.name, []).append(source)
        for name, same in by_name.items():
            labels = {"source": name}
            running = sum(source.state == "running" for source in same)
            yield Metric("source_running", "gauge", "1 while the source runs.", running, labels)
            emitted = sum(source.emitted for source in same)
            yield Metric("source_events", "counter", "Events that the source has broadcast.", emitted, labels)
            failures = sum(source.failures for source in same)
            yield Metric("source_failures", "counter", "Rounds or calls that raised or hung.", failures, labels)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _sink(self) -> Sink:
        # A subclass as in seed 004 sets its websocket_manager itself, perhaps to another one.
        if self._sink_made is None or self._sink_made.target is not self.websocket_manager:
            self._sink_made = Sink(self.websocket_manager)
        return self._sink_made

    def _begin(self, source: Source) -> None:
        source.begin()
        task = asyncio.create_task(_look_after(source), name=f"source {source.name}")
        self._tasks[task] = source
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        source = self._tasks.pop(task, None)
        if source is None or source in self._tasks.values():
            return  # it has been started again meanwhile
        source.end()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("source %s ended for good", source.name, exc_info=error)


async def _look_after(source: Source) -> None:
    """Run a source, again and again if it ends."""
    while True:
        task = asyncio.create_task(source.run(), name=f"run of source {source.name}")
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            _, stuck = await asyncio.wait({task}, timeout=_STOP_GRACE)
            if stuck:
                logger.error("source %s does not heed its cancellation and is left to itself", source.name)  # noqa: TRY400 - the cancellation is ours
            raise
        source.failures += 1
        if task.cancelled():
            how = "was cancelled by somebody"
        elif (error := task.exception()) is not None:
            how = f"died of {type(error).__name__}: {error}"
            logger.error("source %s %s", source.name, how, exc_info=error)
        else:
            how = "returned; it should loop"
        source.last_error = how
        logger.warning("source %s %s; it is started again in %g s", source.name, how, _RESTART_AFTER)
        await asyncio.sleep(_RESTART_AFTER)


def _tell_strays() -> None:
    for name in stray_sources():
        logger.warning("source %s was made and given to no BackgroundTasks: it does not run", name)
