"""A queue between a program and where its events go: nobody waits for the network.

::

    async def redis_emitter(event):
        await redis_client.publish("novelty_events", json.dumps(event))


    queue = EmitterQueue({"redis": redis_emitter, "websocket": websocket_emitter}, maxsize=5000)
    queue.put_nowait({"type": "novelty", "content": {...}})
    await queue.stop()
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from safe_broadcaster.aggregator.lane import Lane
from safe_broadcaster.breakers import CircuitBreakers
from safe_broadcaster.calling import name_of
from safe_broadcaster.checks import check_callable, check_count, check_number, check_seconds, check_timeout
from safe_broadcaster.exceptions import ConfigError
from safe_broadcaster.metrics import Metric
from safe_broadcaster.retry import DEFAULT_BASE_DELAY, DEFAULT_MAX_DELAY
from safe_broadcaster.timestamps import utc_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from typing_extensions import Self

    from safe_broadcaster.config import WhenFull

    Emitter = Callable[[Any], object]

__all__ = ["EmitterQueue"]

logger = logging.getLogger(__name__)


class EmitterQueue:
    """Events wait here for one or several emitters, each of which gets all of them, in order.

    Each emitter has its own queue and circuit breaker: one that fails, hangs or is slow holds up no other. An event
    that could not be emitted is tried again, after 1, 2, 4 … 30 s, and after five errors in a row each minute, until it
    succeeds or the queue's bound decides. Only what will never succeed is given up: an emitter that raises `TypeError`
    or `ValueError` cannot serialise the event. Whatever is lost is logged and counted.

    It needs no start; the first event finds the loop. Events may be put from any thread after that.

    Args:
        event_emitter: An async function of one event (a plain one runs in a thread); several as a mapping of names or a
            list; ``broadcaster.safe_emit`` and ``hub.broadcast_event`` are such functions.
        maxsize: Most events that wait for one emitter. Default 1000.
        when_full: What happens at that bound: ``drop_oldest`` (the default: a dashboard wants the present),
            ``drop_newest``, ``wait`` (holds up `put`) or ``raise`` (`QueueFull`).
        batch_size: Above 1, emitters get lists of at most so many events.
        batch_delay: Seconds that the first event of a batch waits for company. Default 0: only what waits anyway.
        timeout: Seconds that an emitter may take; then it is cancelled, which is an error like others. Default 30.
        max_attempts: How often an event (or batch) is tried before it is given up. None: until it succeeds.
        base_delay: Seconds before the second try.
        max_delay: Longest pause in seconds between tries, but for the breaker's.
        breakers: Those of the emitters, by name; by default new ones that open after 5 errors for 60 s.

    Raises:
        ConfigError: An argument is none of what is allowed.

    """

    def __init__(
        self,
        event_emitter: Emitter | Iterable[Emitter] | Mapping[str, Emitter],
        maxsize: int = 1000,
        *,
        when_full: WhenFull = "drop_oldest",
        batch_size: int = 1,
        batch_delay: float = 0.0,
        timeout: float | None = 30.0,
        max_attempts: int | None = None,
        base_delay: float = DEFAULT_BASE_DELAY,
        max_delay: float = DEFAULT_MAX_DELAY,
        breakers: CircuitBreakers | None = None,
    ) -> None:
        check_timeout("timeout", timeout)
        if max_attempts is not None:
            check_count("max_attempts", max_attempts)
        check_seconds("max_delay", max_delay)
        check_seconds("base_delay", base_delay)
        check_number("base_delay", base_delay, 0, max_delay)
        self.breakers = CircuitBreakers() if breakers is None else breakers
        self._lanes = [
            Lane(
                name,
                emitter,
                self.breakers[name],
                maxsize=maxsize,
                when_full=when_full,
                batch_size=batch_size,
                batch_delay=batch_delay,
                timeout=timeout,
                max_attempts=max_attempts,
                delays=(base_delay, max_delay),
            )
            for name, emitter in _named(event_emitter).items()
        ]
        self._waits = when_full == "wait"

    def put_nowait(self, event: Any) -> bool:
        """Queue an event for all emitters; False if it found no room at one of them (``drop_newest``).

        Raises:
            QueueFull: ``when_full`` is ``raise``, or ``wait``, which only `put` can. No emitter gets the event.
            BroadcasterClosed: It was stopped.

        """
        now = monotonic()
        for lane in self._lanes:
            lane.check_room()
        taken = [lane.inbox.put_nowait((now, event)) for lane in self._lanes]
        return all(taken)

    async def put(self, event: Any) -> bool:
        """Queue an event, after waiting for room where ``when_full`` is ``wait``; else as `put_nowait`."""
        if not self._waits:
            return self.put_nowait(event)
        now = monotonic()
        taken = [await lane.inbox.put((now, event)) for lane in self._lanes]
        return all(taken)

    def qsize(self) -> int:
        """Return how many events the emitter that is furthest behind has not emitted yet."""
        return max(len(lane.inbox) for lane in self._lanes)

    def __len__(self) -> int:
        """Return the same as `qsize`."""
        return self.qsize()

    async def drain(self, timeout: float | None = None) -> bool:
        """Wait until every emitter has had everything; False if not in time."""
        return all(await asyncio.gather(*(lane.inbox.drain(timeout) for lane in self._lanes)))

    async def stop(self, drain_timeout: float = 5.0) -> int:
        """Take no more, emit for at most so many seconds, and return how many events are lost then, which is logged."""
        left = await asyncio.gather(*(lane.inbox.close(drain_timeout) for lane in self._lanes))
        for lane, lost in zip(self._lanes, left, strict=True):
            lane.abandoned += lost
            if lost:
                logger.error("%d events were not emitted to %s before the stop and are lost", lost, lane.name)
        return sum(left)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def last_emission(self) -> datetime | None:
        """When an emitter last took an event; None before the first."""
        last = max((lane.last_emission for lane in self._lanes if lane.last_emission is not None), default=None)
        return None if last is None else datetime.fromtimestamp(last, timezone.utc)

    def get_stats(self) -> dict[str, Any]:
        """Return ``event_queue_size``, ``last_emission`` (as ``2024-01-03T10:30:45Z``), and ``emitters`` by name.

        Each emitter has its ``queue_size``; since the start: events ``emitted``, ``failed`` (given up), ``dropped`` at
        the bound, ``abandoned`` at the stop, ``errors`` (tries), ``latency_max`` and ``latency_mean`` in seconds from
        put to emitted; ``last_error`` and ``circuit_breaker``.
        """
        return {
            "event_queue_size": self.qsize(),
            "last_emission": utc_text(self.last_emission),
            "emitters": {lane.name: lane.get_stats() for lane in self._lanes},
        }

    def metrics(self) -> Iterator[Metric]:
        """Yield the numbers for `safe_broadcaster.export`."""
        for lane in self._lanes:
            name, stats = {"emitter": lane.name}, lane.get_stats()
            yield Metric("emitter_queue_size", "gauge", "Events not emitted yet.", stats["queue_size"], name)
            yield Metric("emitter_breaker_open", "gauge", "1 while the breaker is open.", lane.breaker.tripped, name)
            yield Metric("emitter_errors", "counter", "Tries that failed.", stats["errors"], name)
            for outcome in ("emitted", "failed", "dropped", "abandoned"):
                labels = {**name, "outcome": outcome}
                yield Metric("emitter_events", "counter", "Events by outcome.", stats[outcome], labels)
            yield Metric(
                "emitter_latency_seconds", "counter", "Sum of seconds from put to emitted.", lane.latency, name
            )


def _named(given: object) -> dict[str, Emitter]:
    if isinstance(given, Mapping):
        emitters = {str(name): emitter for name, emitter in cast("Mapping[object, Emitter]", given).items()}
    elif isinstance(given, Iterable) and not callable(cast("object", given)):
        emitters: dict[str, Emitter] = {}
        for emitter in cast("Iterable[Emitter]", given):
            name = name_of(emitter)
            emitters[name if name not in emitters else f"{name} {len(emitters) + 1}"] = emitter
    else:
        emitters = {name_of(cast("object", given)): cast("Emitter", given)}
    if not emitters:
        raise ConfigError(f"event_emitter={given!r} is not allowed: give at least one")
    for emitter in emitters.values():
        check_callable("event_emitter", emitter)
    return emitters
