"""Looks at what a program observes at three paces, and emits what is new.

::

    aggregator = Aggregator(novelty_threshold=0.75, event_emitter=emitter.emit, event_queue_size=10000)
    async with aggregator as agg:
        agg.observe("lambda_max", 0.8)  # from any thread
        await run_application()
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safe_broadcaster.aggregator.emitter_queue import EmitterQueue
from safe_broadcaster.aggregator.interval import AdaptiveInterval, TimeScale
from safe_broadcaster.aggregator.observations import Observations
from safe_broadcaster.aggregator.window import Outcome, Window, summarise
from safe_broadcaster.breakers import CircuitBreaker
from safe_broadcaster.calling import call
from safe_broadcaster.checks import check_callable, check_number, check_timeout
from safe_broadcaster.deadlines import end_tasks, is_alive
from safe_broadcaster.exceptions import BroadcasterClosed, QueueFull
from safe_broadcaster.metrics import Metric
from safe_broadcaster.timestamps import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from typing_extensions import Self

    from safe_broadcaster.aggregator.emitter_queue import Emitter
    from safe_broadcaster.config import WhenFull

__all__ = ["Aggregator"]

logger = logging.getLogger(__name__)

_HELP = {
    "aggregations": "Looks that were summed up.",
    "errors": "Looks that failed.",
    "skipped": "Looks that were left out while the breaker was open.",
    "novelties": "Looks that found something new.",
    "unemitted": "Events that no queue took.",
}


class Aggregator:
    """See the module. Each scale has a task and an `AdaptiveInterval`; all share one circuit breaker.

    At each look what was observed since the last one is summed up. If that is new enough it is queued for the emitters
    as ``{"type":"aggregate.novelty","topic":"aggregate/<scale>/novelty","content":{…},"timestamp":…}``. Nothing waits
    for the emitters. After ``max_consecutive_errors`` of the breaker nothing is aggregated until its cooldown is over;
    what is observed meanwhile is kept for then.

    Args:
        event_emitter: One or several, as for `EmitterQueue`. An `EmitterQueue` of your own is used as it is, and left
            running at the end. None: nothing is emitted, and what is new is logged at info level.
        event_queue_size: Most events that wait for an emitter. Default 1000.
        novelty_threshold: Novelty above which something is emitted, 0 to 1. Default 0.75.
        aggregate: ``aggregate(window, before) -> Outcome``, async or plain (runs in a thread), where ``before`` has
            what was last seen of each name, None at first; by default `summarise`.
        intervals: For some scales or all; by default those of `PACES`. A scale that is given None is not looked at.
        circuit_breaker: By default one that opens after 5 errors for 60 s.
        aggregate_timeout: Seconds that one aggregation may take. Default 30.
        when_full: As for `EmitterQueue`.
        batch_size: As for `EmitterQueue`.
        batch_delay: As for `EmitterQueue`.

    Raises:
        ConfigError: An argument is none of what is allowed.

    """

    def __init__(
        self,
        event_emitter: EmitterQueue | Emitter | Iterable[Emitter] | Mapping[str, Emitter] | None = None,
        event_queue_size: int = 1000,
        novelty_threshold: float = 0.75,
        *,
        aggregate: Callable[[Window, Window | None], object] | None = None,
        intervals: Mapping[TimeScale, AdaptiveInterval | None] | None = None,
        circuit_breaker: CircuitBreaker | None = None,
        aggregate_timeout: float | None = 30.0,
        when_full: WhenFull = "drop_oldest",
        batch_size: int = 1,
        batch_delay: float = 0.0,
    ) -> None:
        check_number("novelty_threshold", novelty_threshold, 0, 1)
        check_timeout("aggregate_timeout", aggregate_timeout)
        check_callable("aggregate", aggregate or summarise)
        self._own: EmitterQueue | None = None
        if event_emitter is not None and not isinstance(event_emitter, EmitterQueue):
            self._own = EmitterQueue(
                event_emitter,
                event_queue_size,
                when_full=when_full,
                batch_size=batch_size,
                batch_delay=batch_delay,
            )
        self.queue = event_emitter if isinstance(event_emitter, EmitterQueue) else self._own
        """Where events wait for the emitters."""
        self._stopped = False
        self.novelty_threshold = novelty_threshold
        self.circuit_breaker = circuit_breaker or CircuitBreaker(name="aggregator")
        chosen = {scale: AdaptiveInterval.of(scale) for scale in TimeScale} | dict(intervals or {})
        self.intervals = {TimeScale(scale): each for scale, each in chosen.items() if each is not None}
        """What is looked at, and how often."""
        self._aggregate = aggregate
        self._timeout = aggregate_timeout
        self._observations = Observations(self.intervals)
        self._before: dict[TimeScale, Window] = {}
        self._looked: dict[TimeScale, float] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._counts = dict.fromkeys(_HELP, 0)

    def observe(self, name: str, value: float = 1.0) -> None:
        """Note a value; from any thread.

        Of more than 1000 names the further ones are counted and not kept, as are NaN and infinities.

        Raises:
            ConfigError: The value is no number.

        """
        self._observations.observe(name, value)

    async def emit(self, event: Mapping[str, Any]) -> bool:
        """Queue an event of your own for the emitters; False if it found no room, or there are none."""
        taken = False
        if self.queue is None:
            logger.info("there is no emitter for %s", event)
        else:
            try:
                taken = await self.queue.put(event)
            except (QueueFull, BroadcasterClosed) as error:
                logger.warning("an event was not emitted: %s", error)
        self._counts["unemitted"] += not taken
        return taken

    async def start(self) -> None:
        """Look from now on, in tasks of the running loop; starting twice does nothing more.

        Raises:
            BroadcasterClosed: It was stopped; make a new one.

        """
        if self._stopped:
            raise BroadcasterClosed("the aggregator was stopped; make a new one")
        if any(map(is_alive, self._tasks)):
            return
        now = asyncio.get_running_loop().time()
        self._looked = dict.fromkeys(self.intervals, now)
        self._tasks = [
            asyncio.create_task(self._look_on(scale), name=f"safe_broadcaster aggregator {scale.value}")
            for scale in self.intervals
        ]

    async def stop(self, drain_timeout: float = 5.0) -> None:
        """Look no more, and emit what is queued for at most so many seconds; what is left then is logged and lost."""
        self._stopped = True
        tasks, self._tasks = self._tasks, []
        await end_tasks(tasks)
        if self._own is not None:
            await self._own.stop(drain_timeout)
        elif self.queue is not None:
            await self.queue.drain(drain_timeout)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def look(self, scale: TimeScale) -> Outcome | None:
        """Aggregate once, as is done at each interval; None if the breaker is open or it failed, which is logged."""
        if not self.circuit_breaker.is_call_permitted():
            self._counts["skipped"] += 1
            return None
        window = self._window(scale)
        try:
            outcome = await self._summed_up(window)
            self.intervals[scale].update(outcome.activity)
        except Exception:
            logger.exception("aggregating %s failed", scale.value, extra={"scale": scale.value})
            self._observations.give_back(scale, dict(window.series))
            self._failed()
            return None
        except BaseException:
            self.circuit_breaker.release()
            raise
        self.circuit_breaker.record_success()
        self._counts["aggregations"] += 1
        self._remember(window)
        self._looked[scale] += window.seconds
        if outcome.novelty > self.novelty_threshold:
            await self._emit_novelty(window, outcome)
        return outcome

    def get_status(self) -> dict[str, Any]:
        """Return ``{"status": {…}}``, ready for JSON.

        In it ``circuit_breaker``, ``adaptive_intervals`` (seconds by scale), ``event_queue_size``, ``last_emission``
        (as ``2024-01-03T10:30:45Z``, None before the first).
        """
        return {
            "status": {
                "circuit_breaker": self.circuit_breaker.get_status(),
                "adaptive_intervals": {scale.value: interval.current for scale, interval in self.intervals.items()},
                "event_queue_size": 0 if self.queue is None else self.queue.qsize(),
                "last_emission": None if self.queue is None else self.queue.get_stats()["last_emission"],
            }
        }

    def get_stats(self) -> dict[str, Any]:
        """Return counts since it was made, and what the queue tells as ``queue``.

        ``aggregations``, ``errors``, ``skipped`` (while the breaker was open), ``novelties``, ``unemitted`` (of them,
        refused by the queue), ``unobserved`` (values of too many names, NaN and infinities).
        """
        return {
            **self._counts,
            "unobserved": self._observations.refused,
            "queue": None if self.queue is None else self.queue.get_stats(),
        }

    def metrics(self) -> Iterator[Metric]:
        """Yield the numbers for `safe_broadcaster.export`."""
        for scale, interval in self.intervals.items():
            labels = {"scale": scale.value}
            yield Metric("aggregator_interval_seconds", "gauge", "Seconds between looks.", interval.current, labels)
        yield Metric("aggregator_breaker_open", "gauge", "1 while it is open.", self.circuit_breaker.tripped)
        for name, help_ in _HELP.items():
            yield Metric(f"aggregator_{name}", "counter", help_, self._counts[name])
        if self._own is not None:
            yield from self._own.metrics()

    async def _look_on(self, scale: TimeScale) -> None:
        interval = self.intervals[scale]
        while True:
            await asyncio.sleep(interval.current)
            try:
                await self.look(scale)
            except Exception:
                logger.exception("looking at %s failed", scale.value, extra={"scale": scale.value})

    def _window(self, scale: TimeScale) -> Window:
        now = asyncio.get_running_loop().time()
        seconds = now - self._looked.setdefault(scale, now)
        return Window(scale, seconds, self._observations.take(scale))

    def _remember(self, window: Window) -> None:
        """Keep what was last seen of each name: a name that is observed rarely is not new each time."""
        before = self._before.get(window.scale)
        series = window.series if before is None else {**before.series, **window.series}
        self._before[window.scale] = Window(window.scale, window.seconds, series)

    async def _summed_up(self, window: Window) -> Outcome:
        before = self._before.get(window.scale)
        if self._aggregate is None:
            return summarise(window, before)
        found = await call(self._aggregate, window, before, timeout=self._timeout)
        outcome = Outcome(*found)
        if not isinstance(outcome.novelty, (int, float)) or not isinstance(outcome.content, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"aggregate returned {found!r}; it is to return Outcome(activity, novelty, content)")
        return outcome

    async def _emit_novelty(self, window: Window, outcome: Outcome) -> None:
        self._counts["novelties"] += 1
        scale = window.scale.value
        about = {"scale": scale, "seconds": window.seconds, "activity": outcome.activity, "novelty": outcome.novelty}
        await self.emit(
            {
                "type": "aggregate.novelty",
                "topic": f"aggregate/{scale}/novelty",
                "content": {**about, **outcome.content},
                "timestamp": utc_now().isoformat(),
            }
        )

    def _failed(self) -> None:
        self._counts["errors"] += 1
        self.circuit_breaker.record_failure()
        if self.circuit_breaker.tripped:
            logger.error(
                "too many errors in a row: nothing is aggregated for %.0f s", self.circuit_breaker.retry_after()
            )
