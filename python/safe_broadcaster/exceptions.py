"""All that this package raises.

::

    BroadcastError
    ├── EventNotSerializable (TypeError)      the event can never be sent: correct it
    ├── EventInvalid (ValueError)             the event does not fit the model of its type: correct it
    ├── EventTooLarge (ValueError)            over max_event_bytes: split it or raise the limit
    ├── EventRefused (ValueError)             the peer does not take the event: it is parked in the spill
    ├── SpillFull (BufferError)               the spill is at its bound and when_full says so
    ├── SpillLocked (RuntimeError)            another owner has the spill, or the hub's log: one path for each
    ├── SpillCorrupt (OSError)                the file at spill_path or log_path is none of ours, or the disk refuses
    ├── ConnectTimeout (TimeoutError)         no link in time; attempts go on in the background
    ├── BusUnavailable (ConnectionError)      Redis cannot be reached, or takes no events: restore it, publish again
    ├── ConnectRefused (ConnectionError)      nobody answers there, or not in our language
    ├── QueueFull (BufferError)               a queue is at its bound and when_full says so: slow down
    ├── HandlerTimeout (TimeoutError)         a function of yours did not return in time: see what it waits for
    ├── CircuitOpen (ConnectionError)         a breaker keeps calls from a service that failed: try again later
    ├── BroadcasterClosed (RuntimeError)      used after stop()
    ├── BootFailed (RuntimeError)             a step of a boot sequence failed; the steps before it are undone
    ├── SourceNotStarted (RuntimeError)       an event source was called before it was started: start it first
    ├── ForkedProcess (RuntimeError)          used in a child after fork: make a new one there
    └── ConfigError (ValueError)              a setting has a value that is not allowed

``except BroadcastError`` catches every one; each is also a child of the builtin that a reader would try.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BootFailed",
    "BroadcastError",
    "BroadcasterClosed",
    "BusUnavailable",
    "CircuitOpen",
    "ConfigError",
    "ConnectRefused",
    "ConnectTimeout",
    "EventInvalid",
    "EventNotSerializable",
    "EventRefused",
    "EventTooLarge",
    "ForkedProcess",
    "HandlerTimeout",
    "QueueFull",
    "SourceNotStarted",
    "SpillCorrupt",
    "SpillFull",
    "SpillLocked",
]


class BroadcastError(Exception):
    """Root of everything that this package raises."""

    is_final: ClassVar[bool] = False
    """Whether the same call, made again, is sure to raise the same."""


class EventNotSerializable(BroadcastError, TypeError):
    """The event is not a mapping or holds something that JSON cannot carry. Nothing was stored."""

    is_final = True


class EventInvalid(BroadcastError, ValueError):
    """The event does not fit the model that is registered for its type. Nothing was sent."""

    is_final = True


class EventTooLarge(BroadcastError, ValueError):
    """The event is larger than ``max_event_bytes``. Nothing was stored."""

    is_final = True


class EventRefused(BroadcastError, ValueError):
    """The peer refused the event, again and again. It is parked in the spill, and the events behind it go on."""

    is_final = True


class SpillFull(BroadcastError, BufferError):
    """The spill is at its bound: the event was refused (``when_full="raise"``), or dropped before its delivery."""


class SpillLocked(BroadcastError, RuntimeError):
    """Another owner, in this process or another, has the file at ``spill_path``, or at the ``log_path`` of a hub."""


class SpillCorrupt(BroadcastError, OSError):
    """The file at ``spill_path``, or a hub's ``log_path``, cannot be used: not ours, or refused by the disk."""


class ConnectTimeout(BroadcastError, TimeoutError):
    """No link within the time allowed; attempts go on in the background."""


class ConnectRefused(BroadcastError, ConnectionError):
    """The peer cannot be reached, or does not answer as a WebSocket server."""


class QueueFull(BroadcastError, BufferError):
    """A queue in memory is at its bound, and its ``when_full`` says that whoever puts is told."""


class HandlerTimeout(BroadcastError, TimeoutError):
    """A function that the package was given did not return within its time and was cancelled."""


class CircuitOpen(BroadcastError, ConnectionError):
    """A circuit breaker let nothing through: the service failed too often, and is left alone for a while."""


class BusUnavailable(BroadcastError, ConnectionError):
    """The Redis between the hubs cannot be reached, or did not take the event in time."""


class BroadcasterClosed(BroadcastError, RuntimeError):
    """The broadcaster or hub was stopped."""

    is_final = True


class BootFailed(BroadcastError, RuntimeError):
    """A step of a `BootSequence` failed; what had begun is undone. Its cause is what the step raised."""

    def __init__(
        self, message: str, *, step: str = "", took: Mapping[str, float] | None = None, undone: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.step = step
        """Name of the step that failed."""
        self.took: Mapping[str, float] = took or {}
        """Seconds of each step that has begun."""
        self.undone = undone
        """Names of the steps that were undone, in that order."""


class SourceNotStarted(BroadcastError, RuntimeError):
    """An event source was called before the `BackgroundTasks` that it belongs to were started."""


class ForkedProcess(BroadcastError, RuntimeError):
    """The object belongs to the parent process; make a new one after ``fork``."""

    is_final = True


class ConfigError(BroadcastError, ValueError):
    """A setting has a value that is not allowed; the message names the setting, its value and what is allowed."""

    is_final = True
