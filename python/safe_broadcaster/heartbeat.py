"""Heartbeats: small events by which a dashboard knows that an engine lives although nothing happens in it.

::

    async with Heartbeat(broadcaster, "ada", snapshot=lambda: {"wm_size": len(memory)}):
        ...

Type, topic and content are those of seed 000. The hub watches them: see ``presence_events`` in `HubConfig`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from safe_broadcaster.calling import name_of
from safe_broadcaster.checks import check_callable, check_seconds
from safe_broadcaster.deadlines import TimedOut, call_here, end_tasks, is_alive, within
from safe_broadcaster.exceptions import (
    BroadcasterClosed,
    ConfigError,
    EventNotSerializable,
    EventTooLarge,
    ForkedProcess,
)
from safe_broadcaster.timestamps import utc_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Emits", "Heartbeat"]

logger = logging.getLogger("safe_broadcaster.heartbeat")

_SNAPSHOT_TIMEOUT = 5.0
"""Seconds that a snapshot may take, or half an interval if that is less: the beat must not wait for it."""

_GOODBYE_TIMEOUT = 2.0
"""Seconds that the end of a heartbeat waits for its goodbye to be accepted."""


class Emits(Protocol):
    """What a heartbeat needs of a broadcaster; `SafeBroadcaster` has it."""

    def safe_emit(self, event: dict[str, Any], /) -> Awaitable[object]:
        """Accept an event."""
        ...


class Heartbeat:
    """Emits ``graph.delta.heartbeat`` at once, and then every ``interval`` seconds, until it is stopped.

    The event is ``{"type": "graph.delta.heartbeat", "topic": "graph/<citizen_id>/delta/heartbeat", "content":
    {"citizen_id": …, …snapshot}, "timestamp": …}``. While the link is down, beats are spilled like all events. `stop`
    says goodbye with ``graph.delta.heartbeat.gone`` on the same topic, so that nobody takes an end that was meant for a
    death.

    Args:
        broadcaster: Whatever has ``safe_emit(event)``; a `SafeBroadcaster`.
        citizen_id: Who lives; one segment of the topic, so without ``/``.
        interval: Seconds between two beats. Default 30, as in seed 000: a hub calls an engine late after 45 s.
        snapshot: Called for each beat, async or plain (then it must not block); returns a mapping that is merged into
            the content. If it raises, hangs, or returns something else, the engine lives all the same: the beat goes
            out without it, and says so as ``snapshot_error``.

    Raises:
        ConfigError: One of these is not allowed.

    """

    def __init__(
        self,
        broadcaster: Emits,
        citizen_id: str,
        interval: float = 30.0,
        snapshot: Callable[[], Any] | None = None,
    ) -> None:
        if not callable(getattr(broadcaster, "safe_emit", None)):
            raise ConfigError(f"broadcaster={broadcaster!r} is not allowed: give an object with safe_emit(event)")
        if not isinstance(citizen_id, str) or not citizen_id or "/" in citizen_id:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"citizen_id={citizen_id!r} is not allowed: give a text that is not empty, without '/'")
        check_seconds("interval", interval)
        if snapshot is not None:
            check_callable("snapshot", snapshot)
        self.citizen_id = citizen_id
        self.interval = interval
        self.beats = 0
        """Beats accepted so far."""
        self._broadcaster = broadcaster
        self._snapshot = snapshot
        self._about = {"citizen_id": citizen_id}
        self._trouble: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Beat from now on, in a task of the running loop. Starting a beating one does nothing."""
        if not self.is_beating():
            self._task = asyncio.create_task(self._run(), name=f"heartbeat of {self.citizen_id}")

    async def stop(self) -> None:
        """Beat no longer, and say goodbye. Not started is fine."""
        task, self._task = self._task, None
        if task is None:
            return
        await end_tasks([task])
        try:
            await self._emit("graph.delta.heartbeat.gone", {}, _GOODBYE_TIMEOUT)
        except (BroadcasterClosed, ForkedProcess):
            return  # there is nobody to say it to
        except Exception:
            logger.exception("the heartbeat of %s could not say goodbye", self.citizen_id, extra=self._about)

    def is_beating(self) -> bool:
        """Whether it beats."""
        return is_alive(self._task)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            try:
                await self._beat()
            except (BroadcasterClosed, ForkedProcess) as error:
                logger.warning("the heartbeat of %s ends: %s", self.citizen_id, error, extra=self._about)
                return
            except Exception:
                logger.exception("a heartbeat of %s could not be emitted", self.citizen_id, extra=self._about)
            # A loop that was held up does not catch up on what it missed: one beat says as much as three.
            due += self.interval * max(1, math.ceil((loop.time() - due) / self.interval))
            await asyncio.sleep(due - loop.time())

    async def _beat(self) -> None:
        content, trouble = await self._look()
        try:
            await self._emit("graph.delta.heartbeat", content, self.interval)
        except (EventNotSerializable, EventTooLarge) as error:
            trouble = f"{type(error).__name__}: {error}"
            await self._emit("graph.delta.heartbeat", {"snapshot_error": trouble}, self.interval)
        if trouble != self._trouble:
            self._trouble = trouble
            if trouble is None:
                logger.info("the snapshot of %s works again", self.citizen_id, extra=self._about)
            else:
                text = "the snapshot of %s fails, it beats without: %s"
                logger.error(text, self.citizen_id, trouble, extra=self._about)
        self.beats += 1

    async def _look(self) -> tuple[dict[str, Any], str | None]:
        """Return what the snapshot gives, or what is wrong with it."""
        if self._snapshot is None:
            return {}, None
        try:
            found: object = await within(min(_SNAPSHOT_TIMEOUT, self.interval / 2), call_here(self._snapshot))
            if not isinstance(found, Mapping):
                raise TypeError(f"{name_of(self._snapshot)} returned {type(found).__name__}, not a mapping")  # noqa: TRY301 - told as any other
            return dict(cast("Mapping[str, Any]", found)), None
        except Exception as error:  # noqa: BLE001 - told in the beat and in the log
            trouble = f"{type(error).__name__}: {error}"
            return {"snapshot_error": trouble}, trouble

    async def _emit(self, kind: str, content: dict[str, Any], patience: float) -> None:
        """Emit; the event is accepted at the call, so that waiting for its outcome may be given up."""
        outcome = self._broadcaster.safe_emit(
            {
                "type": kind,
                "topic": f"graph/{self.citizen_id}/delta/heartbeat",
                "content": {"citizen_id": self.citizen_id, **content} | {"citizen_id": self.citizen_id},
                "timestamp": utc_now().isoformat(),
            }
        )
        try:
            # Not `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes together with the outcome.
            await within(patience, asyncio.ensure_future(outcome))
        except TimedOut:
            if not getattr(outcome, "is_accepted", True):
                raise
            logger.debug("%s of %s is accepted and not confirmed yet", kind, self.citizen_id)
