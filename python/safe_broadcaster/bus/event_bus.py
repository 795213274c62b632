"""Events inside a program: whoever publishes knows nothing of who listens, and is not harmed by it.

::

    bus = EventBus()
    bus.subscribe(SampleProcessedEvent, on_sample)  # async, or plain: that runs in a thread
    await bus.publish(SampleProcessedEvent(...))  # returns at once; the handlers run in tasks
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from safe_broadcaster.calling import Handler, name_of
from safe_broadcaster.checks import check_callable, check_timeout
from safe_broadcaster.exceptions import BroadcastError, ConfigError, QueueFull
from safe_broadcaster.inbox import Inbox
from safe_broadcaster.metrics import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from typing_extensions import Self

    from safe_broadcaster.config import WhenFull

__all__ = ["EventBus"]

E = TypeVar("E")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Subscription:
    function: Callable[[Any], object]
    run: Handler
    inbox: Inbox[tuple[_Subscription, object]]


class EventBus:
    """Brings events to those who subscribed to their class, or to a class above it.

    A handler gets its events one after the other, in the order in which they were published. The methods of one object
    share one queue: the object sees all its events in order, and is never called twice at once. Different handlers do
    not wait for each other. What a handler raises is logged under this module's logger, and the next event follows.

    Handlers run on the loop on which they were subscribed; those that were subscribed without one, or whose loop is
    closed, run on the publisher's. Events may be published from any loop and thread.

    Args:
        queue_size: Most events that wait for one handler (or the handlers of one object). Default 1000: some seconds of
            a busy program, and a bound to what a handler that hangs can hold.
        when_full: What happens at that bound: ``drop_oldest`` (the default, because a publisher must never be held up;
            told in the log and counted), ``drop_newest``, ``wait`` (holds up `publish`) or ``raise`` (`QueueFull`).
        handler_timeout: Seconds after which a handler is cancelled. Default 30, more than a slow mail server takes;
            None: never. A plain function cannot be cancelled: only its own events wait for it.

    Raises:
        ConfigError: A setting has a value that is not allowed.

    """

    def __init__(
        self,
        *,
        queue_size: int = 1000,
        when_full: WhenFull = "drop_oldest",
        handler_timeout: float | None = 30.0,
    ) -> None:
        check_timeout("handler_timeout", handler_timeout)
        self._queue_size = queue_size
        self._when_full: WhenFull = when_full
        self._handler_timeout = handler_timeout
        self._lock = threading.Lock()
        self._handlers: dict[type, tuple[_Subscription, ...]] = {}
        self._reached: dict[type, tuple[_Subscription, ...]] = {}
        self._leaving: list[_Subscription] = []
        """Those that have ended, until their handlers had what they were promised."""
        self._published = self._handled = self._failed = self._dropped_before = 0
        self._new_inbox("event bus")  # a wrong setting is told here

    def subscribe(self, event_type: type[E], handler: Callable[[E], object]) -> Callable[[], None]:
        """Have a handler called with each event of a class; subscribing it twice does nothing more.

        Args:
            event_type: The class; events of classes below it count too, so ``object`` is everything. A handler that
                is subscribed to several of an event's classes is called once.
            handler: Async, or plain: that runs in a thread. What it returns is not looked at.

        Returns:
            A function that ends the subscription.

        Raises:
            ConfigError: The one is no class, or the other cannot be called.

        """
        if not isinstance(event_type, type):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"event_type={event_type!r} is not allowed: give a class")
        check_callable("handler", handler)
        with self._lock:
            known = self._handlers.get(event_type, ())
            if not any(each.function == handler for each in known):
                added = _Subscription(handler, Handler(handler, self._handler_timeout), self._inbox_for(handler))
                self._handlers[event_type] = (*known, added)
                self._reached = {}

        def unsubscribe() -> None:
            self.unsubscribe(event_type, handler)

        return unsubscribe

    def unsubscribe(self, event_type: type[E], handler: Callable[[E], object]) -> bool:
        """End a subscription; False if there was none. Events that wait for the handler still reach it."""
        with self._lock:
            known = self._handlers.get(event_type, ())
            left = tuple(each for each in known if each.function != handler)
            gone = [each for each in known if each.function == handler]
            self._handlers[event_type] = left
            if not left:
                del self._handlers[event_type]
            self._reached = {}
            self._leaving += gone
            self._inboxes_locked()
        return bool(gone)

    async def publish(self, event: object) -> int:
        """Hand an event to its handlers, and return how many there are. They run later, each in its own time.

        Raises:
            QueueFull: A handler's queue is full, and ``when_full`` is ``raise``. The other handlers get the event.

        """
        if self._when_full != "wait":
            return self.publish_nowait(event)
        handlers = self._handlers_of(type(event))
        for handler in handlers:
            await handler.inbox.put((handler, event))
        return self._count(event, handlers)

    def publish_nowait(self, event: object) -> int:
        """As `publish`, from any thread and without a loop.

        Raises:
            QueueFull: As `publish`; also where ``when_full`` is ``wait``, which only `publish` can.
            BroadcastError: This thread has no event loop, and a handler was subscribed without one.

        """
        handlers = self._handlers_of(type(event))
        full: QueueFull | None = None
        for handler in handlers:
            try:
                handler.inbox.put_nowait((handler, event))
            except QueueFull as error:  # noqa: PERF203 - the others get it all the same
                full = error
        if full is not None:
            raise full
        return self._count(event, handlers)

    def get_handler_count(self, event_type: type | None = None) -> int:
        """Return how many handlers an event of this class reaches; without one, how many subscriptions there are."""
        if event_type is None:
            with self._lock:
                return sum(map(len, self._handlers.values()))
        return len(self._handlers_of(event_type))

    async def drain(self, timeout: float | None = None) -> bool:
        """Wait until all handlers are done with what was published so far; False if not in time.

        Raises:
            BroadcastError: A handler calls it, which would wait for itself.

        """
        inboxes = self._inboxes()
        if asyncio.current_task() in {inbox.task for inbox in inboxes}:
            raise BroadcastError("a handler cannot wait for the end of all handlers; return, and wait elsewhere")
        return all(await asyncio.gather(*(inbox.drain(timeout) for inbox in inboxes)))

    async def stop(self, drain_timeout: float = 5.0) -> None:
        """Let the handlers finish for at most so many seconds, then cancel them; what was left undone is logged.

        The subscriptions stay: events that are published afterwards reach them.
        """
        with self._lock:
            old = self._inboxes_locked()
            fresh = {id(each): self._new_inbox(each.name) for each in old}
            self._handlers = {
                event_type: tuple(_Subscription(each.function, each.run, fresh[id(each.inbox)]) for each in handlers)
                for event_type, handlers in self._handlers.items()
            }
            self._reached, self._leaving = {}, []
            self._dropped_before += sum(inbox.dropped for inbox in old)
        left = await asyncio.gather(*(inbox.close(drain_timeout) for inbox in old))
        for inbox, undone in zip(old, left, strict=True):
            if undone:
                logger.error("%s was not done with %d events when the bus stopped", inbox.name, undone)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def _running_tasks(self) -> set[asyncio.Task[None]]:
        """The tasks that run handlers now, at most one for each handler. Only to be looked at."""
        return {task for inbox in self._inboxes() if (task := inbox.task) is not None}

    def get_stats(self) -> dict[str, int]:
        """Return ``handlers``, ``running`` (tasks) and ``pending`` (calls) now.

        Since the bus was made: events ``published``, and calls ``handled``, ``failed`` and ``dropped``.
        """
        inboxes = self._inboxes()
        return {
            "handlers": self.get_handler_count(),
            "running": len(self._running_tasks),
            "pending": sum(map(len, inboxes)),
            "published": self._published,
            "handled": self._handled,
            "failed": self._failed,
            "dropped": self._dropped_before + sum(inbox.dropped for inbox in inboxes),
        }

    def metrics(self) -> Iterator[Metric]:
        """Yield the numbers for `safe_broadcaster.export`."""
        stats = self.get_stats()
        yield Metric("bus_handlers", "gauge", "Subscriptions.", stats["handlers"])
        yield Metric("bus_pending", "gauge", "Calls of handlers that wait or run.", stats["pending"])
        yield Metric("bus_published", "counter", "Events that were published.", stats["published"])
        for outcome in ("handled", "failed", "dropped"):
            yield Metric("bus_calls", "counter", "Calls of handlers by outcome.", stats[outcome], {"outcome": outcome})

    def _count(self, event: object, handlers: tuple[_Subscription, ...]) -> int:
        self._published += 1
        if not handlers:
            logger.debug("nobody subscribed to %s", type(event).__name__)
        return len(handlers)

    async def _consume(self, items: list[tuple[_Subscription, object]]) -> None:
        for handler, event in items:
            try:
                await handler.run(event)
            except Exception:  # noqa: PERF203 - one at a time
                self._failed += 1
                where = {"handler": name_of(handler.function), "event_type": type(event).__name__}
                logger.exception("%s failed on %s", where["handler"], where["event_type"], extra=where)
            else:
                self._handled += 1

    def _handlers_of(self, event_type: type) -> tuple[_Subscription, ...]:
        found = self._reached.get(event_type)
        if found is None:
            with self._lock:
                known = (each for above in event_type.__mro__ for each in self._handlers.get(above, ()))
                found = self._reached[event_type] = _once(known)
        return found

    def _inbox_for(self, handler: Callable[[Any], object]) -> Inbox[tuple[_Subscription, object]]:
        owner = _owner(handler)
        for each in itertools.chain(self._all(), self._leaving):
            if _owner(each.function) is owner:
                return each.inbox
        return self._new_inbox(f"event bus, {name_of(handler)}")

    def _new_inbox(self, name: str) -> Inbox[tuple[_Subscription, object]]:
        return Inbox(self._consume, maxsize=self._queue_size, when_full=self._when_full, name=name)

    def _all(self) -> Iterator[_Subscription]:
        return (each for handlers in self._handlers.values() for each in handlers)

    def _inboxes(self) -> list[Inbox[tuple[_Subscription, object]]]:
        with self._lock:
            return self._inboxes_locked()

    def _inboxes_locked(self) -> list[Inbox[tuple[_Subscription, object]]]:
        in_use = {id(each.inbox): each.inbox for each in self._all()}
        over = {id(each.inbox): each.inbox for each in self._leaving if not len(each.inbox)}
        self._dropped_before += sum(inbox.dropped for which, inbox in over.items() if which not in in_use)
        self._leaving = [each for each in self._leaving if id(each.inbox) not in over]
        return list((in_use | {id(each.inbox): each.inbox for each in self._leaving}).values())


def _once(handlers: Iterable[_Subscription]) -> tuple[_Subscription, ...]:
    """Leave out functions that are reached by two classes."""
    found: list[_Subscription] = []
    for handler in handlers:
        if not any(each.function == handler.function for each in found):
            found.append(handler)
    return tuple(found)


def _owner(handler: Callable[[Any], object]) -> object:
    """Return whose events are kept in order: an object for its methods, else the function."""
    owner = getattr(handler, "__self__", None)
    return handler if owner is None else owner
