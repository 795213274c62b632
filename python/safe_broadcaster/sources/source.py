"""What all sources have: a type of event, a place to send it to, and numbers that tell how they do."""

from __future__ import annotations

import asyncio
import logging
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Literal

from safe_broadcaster.checks import check_seconds
from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from safe_broadcaster.sources.sink import Sink

__all__ = ["Source", "pause", "stray_sources"]

logger = logging.getLogger("safe_broadcaster.sources")

_QUIET_ROUNDS = 3
"""So many rounds without any event are worth a warning: by then a source that works has said what it begins with."""

_stray: weakref.WeakSet[Source] = weakref.WeakSet()


def stray_sources() -> list[str]:
    """Return the names of sources that were made and given to no `BackgroundTasks`."""
    return sorted(source.name for source in _stray)


class Source:
    """The base of all sources. `BackgroundTasks` runs them; `status` tells how one does.

    A source that is never started says so with a `RuntimeWarning` when it is forgotten, as a coroutine does that is
    never awaited.
    """

    def __init__(self, event_type: str, *, topic: str | None, name: str, timeout: float) -> None:
        if not isinstance(event_type, str) or not event_type:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"event_type={event_type!r} is not allowed: give a text that is not empty")
        if topic is not None and (not isinstance(topic, str) or not topic):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"topic={topic!r} is not allowed: give a text that is not empty, or None")
        check_seconds("timeout", timeout)
        self.event_type = event_type
        self.topic = topic
        self.name = name
        self.timeout = timeout
        self.state: Literal["new", "running", "stopped"] = "new"
        """``new`` until it is started for the first time."""
        self.emitted = 0
        """Events broadcast."""
        self.rounds = 0
        """Rounds, or calls, that ended well, whether or not they had something to broadcast."""
        self.failures = 0
        """Rounds, or calls, that raised or hung, and runs that ended by themselves."""
        self.failures_in_row = 0
        """Those of them since the last one that ended well."""
        self.last_error: str | None = None
        """What the last of them raised."""
        self._sink: Sink | None = None
        self._warned_quiet = False
        self._owned = False
        _stray.add(self)

    def attach(self, sink: Sink) -> None:
        """Take the place to send to; a source has one."""
        if self._owned:
            raise ConfigError(
                f"source {self.name!r} has a place already: give it to one BackgroundTasks only, and once"
            )
        self._sink = sink
        self._owned = True
        _stray.discard(self)

    def begin(self) -> None:
        """Get ready for a `run` in the running loop, which may be another one than before."""
        self.state = "running"

    def end(self) -> None:
        """Know that there will be no further `run`, until it begins again."""
        self.state = "stopped"

    async def run(self) -> None:
        """Work until cancelled."""
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        """Return its numbers."""
        return {
            "name": self.name,
            "event_type": self.event_type,
            "state": self.state,
            "emitted": self.emitted,
            "rounds": self.rounds,
            "failures": self.failures,
            "failures_in_row": self.failures_in_row,
            "last_error": self.last_error,
        }

    async def _broadcast(self, data: object) -> None:
        assert self._sink is not None
        event = {"type": self.event_type, "data": data}
        if self.topic is not None:
            event["topic"] = self.topic
        await self._sink.send(event, self.timeout)
        self.emitted += 1
        logger.debug("Broadcast %s", self.event_type, extra={"source": self.name, "event_type": self.event_type})

    def _went_well(self) -> None:
        self.rounds += 1
        if self.failures_in_row:
            logger.info("source %s works again after %d failures", self.name, self.failures_in_row)
            self.failures_in_row = 0
        if self.emitted == 0 and self.rounds >= _QUIET_ROUNDS and not self._warned_quiet:
            self._warned_quiet = True
            logger.warning("source %s has broadcast nothing in %d rounds: %s", self.name, self.rounds, self._hint())

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self.failures_in_row += 1
        self.last_error = f"{type(error).__name__}: {error}"
        logger.error(
            "source %s failed (%d in a row), it goes on: %s",
            self.name,
            self.failures_in_row,
            self.last_error,
            exc_info=error if self.failures_in_row == 1 else None,
            extra={"source": self.name},
        )

    def _hint(self) -> str:
        return "let its function return what is to be broadcast"

    def __del__(self) -> None:
        if getattr(self, "state", None) == "new" and hasattr(self, "_owned"):  # one that was refused is none
            warnings.warn(
                f"source {self.name!r} was never started: give it to BackgroundTasks, and start those",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )


async def pause(seconds: float, wake: asyncio.Event) -> None:
    """Wait for so long, or until woken."""
    waking = asyncio.ensure_future(wake.wait())
    try:
        # Not `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes together with the waking.
        await asyncio.wait({waking}, timeout=seconds)
    finally:
        waking.cancel()
