"""Where events come from: states that are polled, things that happen, and both.

::

    tasks = BackgroundTasks(hub)
    tasks.add(sources.poll(read_status, every=5.0, event_type="status_update"))

    @sources.on_event("queue_update", to=hub)
    async def phase_completed(queue_id): ...

The four patterns are those of seed 004, and its five common mistakes cannot be made, or are loud: a source that never
emits, dies of an exception, floods, repeats itself, or was never started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from safe_broadcaster.sources.conditions import Key, Significant, relative_change
from safe_broadcaster.sources.events import Errors, EventSource, WhenFull
from safe_broadcaster.sources.polling import HybridSource, Listening, PollSource
from safe_broadcaster.sources.source import Source
from safe_broadcaster.sources.tasks import BackgroundTasks

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "BackgroundTasks",
    "EventSource",
    "HybridSource",
    "PollSource",
    "Source",
    "conditional",
    "hybrid",
    "on_event",
    "poll",
    "relative_change",
]

F = TypeVar("F", bound="Callable[..., Any]")

DEFAULT_TIMEOUT = 30.0
"""Seconds that a fetch, and a broadcast, may take: beyond that the state is old."""

DEFAULT_MINIMUM = 1.0
"""Least seconds between two polls: the quickest row in the table of seed 004."""


def poll(
    fetch: Callable[[], Any],
    every: float = 5.0,
    *,
    event_type: str,
    key: Key = None,
    topic: str | None = None,
    name: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    minimum: float = DEFAULT_MINIMUM,
) -> PollSource:
    """Make a source that fetches a state every few seconds, and broadcasts it if it has changed.

    The event is ``{"type": event_type, "data": state}``. For status, configuration and statistics, which change
    without saying so.

    Args:
        fetch: Returns the state, as anything that JSON can carry; None for "no state". An async function runs in the
            event loop, a plain one in a thread of its own, so that it may block. What it raises is logged, and it is
            asked again after ``every`` seconds; one that hangs is not called a second time before it has ended.
        every: Seconds between the end of a round and the next. Default 5. Seed 004 advises 1 to 5 for what is critical,
            5 to 15 for what is important, 15 to 30 for a system's status, 30 to 60 for what changes slowly.
        event_type: Type of the events.
        key: What of the state is compared: a function of it, or the name of a field. Default: all of it, as JSON, whose
            order of names does not count. A state that is changed in place is noticed.
        topic: Topic of the events. Default: none.
        name: For logs and ``status()``. Default: type and function.
        timeout: Seconds that a fetch, and a broadcast, may take.
        minimum: Least value of ``every``; lower it on purpose.

    Raises:
        ConfigError: One of these is not allowed.

    """
    return PollSource(
        fetch, every=every, event_type=event_type, key=key, topic=topic, name=name, timeout=timeout, minimum=minimum
    )


def conditional(
    fetch: Callable[[], Any],
    every: float = 5.0,
    *,
    event_type: str,
    listening: Listening = True,
    significant: Significant = None,
    key: Key = None,
    topic: str | None = None,
    name: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    minimum: float = DEFAULT_MINIMUM,
) -> PollSource:
    """Make a source as `poll` does that broadcasts only if somebody listens and the change is worth it.

    For states that are large, change all the time, or cost something to fetch. Compared is with the last state that was
    broadcast, so a slow drift is told in the end.

    Args:
        fetch: As for `poll`.
        every: As for `poll`.
        event_type: As for `poll`.
        listening: True: nothing is even fetched while the WebSocket manager has no connection. A function, async or
            plain: asked instead. False: always fetched.
        significant: A function of the new and the old state that says whether the change is worth an event; or a
            relative threshold, as 0.1 for a tenth: an event is worth it if a number in the state has moved by more
            (`relative_change`), or if anything else has changed at all. Default: any change.
        key: As for `poll`; a threshold looks at nothing else.
        topic: As for `poll`.
        name: As for `poll`.
        timeout: As for `poll`.
        minimum: As for `poll`.

    Raises:
        ConfigError: One of these is not allowed; or, when the source is added to `BackgroundTasks`, their WebSocket
            manager cannot tell whether somebody listens.

    """
    return PollSource(
        fetch,
        every=every,
        event_type=event_type,
        key=key,
        topic=topic,
        name=name,
        timeout=timeout,
        minimum=minimum,
        listening=listening,
        significant=significant,
    )


def hybrid(
    fetch: Callable[[], Any],
    every: float = 5.0,
    *,
    event_type: str,
    key: Key = None,
    topic: str | None = None,
    name: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    minimum: float = DEFAULT_MINIMUM,
) -> HybridSource:
    """Make a source that broadcasts a state when it is told of a change, and polls in case it was not told.

    Tell it with ``await source.notify(state)``, with ``await source.notify()`` which fetches, or by decorating a
    handler with ``@source.on_event``. No state is sent twice: what an event has brought is no news for the poll, and a
    fetch that an event has overtaken does not count. For queues and workflows whose events may be missed.

    Args:
        fetch: As for `poll`.
        every: As for `poll`; the longest time for which a missed event stays unknown.
        event_type: As for `poll`.
        key: As for `poll`. If events bring the state in another form than ``fetch``, let this make both comparable.
        topic: As for `poll`.
        name: As for `poll`.
        timeout: As for `poll`.
        minimum: As for `poll`.

    Raises:
        ConfigError: One of these is not allowed.

    """
    return HybridSource(
        fetch, every=every, event_type=event_type, key=key, topic=topic, name=name, timeout=timeout, minimum=minimum
    )


def on_event(
    event_type: str,
    *,
    to: object = None,
    topic: str | None = None,
    name: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    errors: Errors = "log",
    max_waiting: int = 1000,
    when_full: WhenFull = "drop_newest",
) -> Callable[[F], F]:
    """Decorate a handler, so that what it returns is broadcast at once as ``{"type": event_type, "data": …}``.

    The handler is called as before and returns what it returned; None is not broadcast. An async one has broadcast when
    its await ends. A plain one, from whichever thread, has its result broadcast soon after, in the loop of its
    `BackgroundTasks`.

    Args:
        event_type: Type of the events.
        to: Where to broadcast to, as for `BackgroundTasks`; for async handlers. Default: give the handler to
            ``BackgroundTasks.add``; called before those are started, it raises `SourceNotStarted`.
        topic: As for `poll`.
        name: For logs and ``status()``. Default: type and handler.
        timeout: Seconds that a broadcast may take.
        errors: ``"log"``: what the handler or the broadcast raises is logged, and the handler returns None, as in
            seed 004: an event must not bring down what it came from. ``"raise"``: it is logged and raised, for the
            routes of a web application.
        max_waiting: Most results of plain handlers that wait. Default 1000: some seconds of a flood.
        when_full: What happens at that bound: ``"drop_newest"``, which is logged and counted, or ``"raise"``
            (`BufferError`).

    Raises:
        ConfigError: One of these is not allowed, or ``to`` is given for a plain handler.

    """
    source = EventSource(
        event_type,
        to=to,
        topic=topic,
        name=name,
        timeout=timeout,
        errors=errors,
        max_waiting=max_waiting,
        when_full=when_full,
    )
    return source.wrap
