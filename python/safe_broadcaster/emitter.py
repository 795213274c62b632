"""The emitter: ``await broadcaster.safe_emit(event)`` is all that an engine has to know.

The Rust core accepts, spills, sends and recovers; this module gives it Python's manners: awaitables, an event bus for
its reports, and links through objects that Python users already have.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import logging
import math
import os
import time
import weakref
from collections.abc import Coroutine
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import orjson

from safe_broadcaster import _core
from safe_broadcaster.config import EmitterConfig
from safe_broadcaster.exceptions import BroadcastError, ConfigError, ConnectTimeout
from safe_broadcaster.mailbox import Mailbox, Questions
from safe_broadcaster.peer import PeerServer, is_peer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator
    from types import TracebackType

    from typing_extensions import Self

    from safe_broadcaster.config import Durability

__all__ = ["FlushResult", "HealthBus", "Ready", "SafeBroadcaster", "Spill"]

logger = logging.getLogger("safe_broadcaster")

_EXIT_DEADLINE = 2.0
"""Seconds that an interpreter which ends without ``stop()`` spends on sending; the rest goes to the spill."""

_MAX_REPORTS = 100
"""Reports that a health bus may be busy with at once: one that never returns must not fill memory."""

_PEEK_BYTES = 1 << 20
"""Bytes of stored events read at a time while iterating."""


class HealthBus(Protocol):
    """Whatever takes the broadcaster's reports; ``inject`` may be a plain or an async method."""

    def inject(self, report: dict[str, Any], /) -> Awaitable[object] | object:
        """Take a report."""
        ...


class FlushResult(NamedTuple):
    """What a flush achieved."""

    flushed: int
    """Spilled events that the peer has confirmed."""
    failed: int
    """Events that were tried and not confirmed; still stored."""
    remaining: int
    """Spilled events left."""


class Ready:
    """The gate that engines wait for: opens when the link is up for the first time and stays open."""

    def __init__(self, core: SafeBroadcaster, questions: Questions) -> None:
        self._core = weakref.ref(core)
        self._questions = questions

    def is_set(self) -> bool:
        """Whether the link has been up."""
        core = self._core()
        return core is not None and core._is_ready

    async def wait(self) -> bool:
        """Wait until the link has been up. Returns True."""
        core = self._core()
        if core is None:
            raise BroadcastError("the broadcaster is gone")
        if not core._is_ready:
            await self._questions.answered("ready", core._await_ready, None)
        return True


class Spill:
    """The stored events that have not been confirmed, oldest first. Iterating reads them; it changes nothing."""

    def __init__(self, core: SafeBroadcaster) -> None:
        self._core = weakref.ref(core)

    def __len__(self) -> int:
        core = self._core()
        return 0 if core is None else core._depth

    def __iter__(self) -> Iterator[dict[str, Any]]:
        core = self._core()
        after = 0
        while core is not None:
            batch = core._peek(after, _PEEK_BYTES)
            if not batch:
                return
            for seq, event in batch:
                yield orjson.loads(event)
                after = seq

    def peek(self, n: int = 1) -> list[dict[str, Any]]:
        """Return the ``n`` oldest stored events."""
        return [event for _, event in zip(range(n), self, strict=False)]


class _Outcome(Coroutine[Any, Any, bool]):
    """An outcome that has to be waited for. Unlike a plain coroutine it may be forgotten: the event is accepted."""

    __slots__ = ("_start", "_steps", "is_accepted")

    def __init__(self, start: Callable[[], Coroutine[Any, Any, bool]], *, is_accepted: bool = True) -> None:
        self._start = start
        self.is_accepted = is_accepted
        """False only where memory was full at the call, and the policy is to wait: then the await accepts it."""
        self._steps: Coroutine[Any, Any, bool] | None = None

    def __await__(self) -> Generator[Any, Any, bool]:
        return self._start().__await__()

    def send(self, value: Any, /) -> Any:
        if self._steps is None:
            self._steps = self._start()
        return self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        if self._steps is None:
            self._steps = self._start()
        return self._steps.throw(*error)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()


class _Kept(asyncio.Future[bool], Coroutine[Any, Any, bool]):
    """An outcome at ``power``: a future, so that a thousand of them gathered need no task each.

    It is a coroutine too, for ``create_task`` and ``TaskGroup``, which take nothing else.
    """

    _steps: Generator[Any, Any, bool] | None = None

    def send(self, value: Any, /) -> Any:
        if self._steps is None:
            self._steps = self.__await__()
        return self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        if self._steps is None:
            self._steps = self.__await__()
        return self._steps.throw(*error)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()


class SafeBroadcaster(_core.Emitter):
    """Carries events to a hub or any WebSocket server without losing one silently.

    Args:
        ws_client: A ``ws://`` or ``wss://`` URL; or a hub's ``.client`` (in-process, no socket); or any object with
            ``connect()``, ``wait_until_ready()``, ``is_available()`` and ``send(event)``, each sync or async.
        spill_path: The SQLite file in which events wait while the link is down. One file for each broadcaster.
        health_bus: Any object with ``inject(report)``, sync or async; None for none. Its failures are logged.
        config: Settings as one object.
        **settings: Single settings, the fields of `EmitterConfig`.

    Raises:
        ConfigError: A setting is unknown or has a value that is not allowed.

    """

    def __init__(
        self,
        ws_client: object,
        spill_path: str | os.PathLike[str] = ".broadcaster_spill.db",
        health_bus: HealthBus | None = None,
        *,
        config: EmitterConfig | None = None,
        **settings: Any,
    ) -> None:
        self.config = EmitterConfig.build(config, settings)
        self.health_bus = health_bus
        self._questions = Questions()
        self.ready = Ready(self, self._questions)
        self.spill = Spill(self)
        try:
            self.spill_path = os.fspath(spill_path)
        except TypeError:
            raise ConfigError(f"spill_path={spill_path!r} is not allowed: give the path of a file") from None
        self.ws = ws_client
        self._unsynced: dict[asyncio.AbstractEventLoop, list[tuple[int, bool, _Kept]]] = {}
        self._home: tuple[Mailbox, int] | None = None
        self._peer: PeerServer | None = None
        self._reports: set[asyncio.Future[Any]] = set()
        target: object = ws_client
        probe: Callable[[], bool] | None = None
        core = getattr(ws_client, "core", None)
        if isinstance(core, _core.HubClient):
            target = core
        elif not isinstance(ws_client, str):
            if not is_peer(ws_client):
                raise ConfigError(
                    f"ws_client={ws_client!r} is not allowed: give a ws:// or wss:// URL, a hub's client, or an object "
                    "with connect(), wait_until_ready(), is_available() and send(event)"
                )
            self._peer = PeerServer(self, ws_client)
            target, probe = None, self._peer.probe
        self._open(target, self.spill_path, self.config, probe)
        _living.add(self)

    async def start(self, timeout: float | None = None) -> None:
        """Open the spill, recover what an earlier process left, and connect; returns when the link is live.

        Args:
            timeout: Seconds to wait for the link. None: as long as it takes.

        Raises:
            ConnectTimeout: Not live in time; attempts go on in the background.
            SpillLocked: Another broadcaster owns the file at ``spill_path``.
            SpillCorrupt: The file at ``spill_path`` cannot be used.
            BroadcasterClosed: It was stopped.

        """
        self._settle(Mailbox.current())
        await self._in_time("start", self._start, timeout)

    def _settle(self, mailbox: Mailbox) -> None:
        """Have reports and requests for a duck-typed client come to the loop that called ``start()`` last."""
        if self._home is not None and self._home[0] is mailbox:
            return
        self._leave()
        inject = weakref.WeakMethod(self._inject)  # the loop must not keep a forgotten broadcaster running

        def deliver(letter: tuple[bytes, float]) -> None:
            if (method := inject()) is not None:
                method(letter)

        self._home = mailbox, mailbox.subscribe(deliver)
        self._report_to(mailbox.core, self._home[1])
        if self._peer is not None:
            self._peer.serve(mailbox)

    def _leave(self) -> None:
        if self._home is not None:
            mailbox, token = self._home
            mailbox.unsubscribe(token)
            self._home = None

    async def wait_connected(self, timeout: float | None = None) -> None:
        """Wait until the link is live now.

        Raises:
            ConnectTimeout: Not live in time.

        """
        await self._in_time("live", self._await_live, timeout)

    async def _in_time(self, what: str, ask: Callable[[_core.Mailbox, int], None], timeout: float | None) -> None:
        if not await self._questions.answered(what, ask, timeout):
            last = self.get_stats()["last_error"]
            because = f" (last error: {last})" if last else ""
            raise ConnectTimeout(f"no link within {timeout} s{because}; attempts go on in the background")

    async def flush_spill(self) -> FlushResult:
        """Ask for a flush now, without waiting for the backoff, and wait for its end.

        A flush also happens by itself after every reconnect.
        """
        mailbox = Mailbox.current()
        reply = mailbox.reply()
        self._flush(mailbox.core, reply.token)
        return FlushResult(*cast("tuple[int, int, int]", await reply.wait()))

    async def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything accepted so far has been acknowledged; False if not in time."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        if self._questions.is_open("drain"):
            if not await self._questions.answered("drain", self._drain, timeout):
                return False  # not even what was accepted before an earlier call
            timeout = None if timeout is None else deadline - time.monotonic()
        return await self._questions.answered("drain", self._drain, timeout)

    async def stop(self, drain_timeout: float = 5.0) -> None:
        """Accept nothing more, send for at most ``drain_timeout`` seconds, leave the rest in the spill, close it.

        A second call waits for the same end. If the await is cancelled, stopping goes on.

        Raises:
            SpillCorrupt: The disk refused events that could not be sent either. At ``durability="memory"`` they are
                lost; else the outbox's file keeps them for the next process, and this is raised only if the spill
                could not even be opened.

        """
        mailbox = Mailbox.current()
        reply = mailbox.reply()
        self._stop(mailbox.core, reply.token, drain_timeout)
        await reply.wait()
        _living.discard(self)
        if self._peer is not None:
            self._peer.stop()
        self._leave()
        loop = asyncio.get_running_loop()
        under_way = [report for report in self._reports if report.get_loop() is loop]
        if under_way:  # they reach their bus
            await asyncio.wait(under_way, timeout=drain_timeout)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def _outcome(self, seq: int, provisional: bool, live: bool, pressed: bool, level: Durability | None) -> _Outcome:
        """Make what ``safe_emit`` returns when there is something to wait for; the event is accepted already."""

        async def outcome() -> bool:
            if pressed:
                await self._room()
            if level is not None:
                mailbox = Mailbox.current()
                reply = mailbox.reply()
                self._await_level(mailbox.core, reply.token, level, seq, provisional)
                await reply.wait()
            return live or level == "delivered"

        return _Outcome(outcome)

    def _keep(self, seq: int, live: bool) -> Coroutine[Any, Any, bool]:
        """Make what ``safe_emit`` returns at ``power``; all of one turn of the loop are synced together."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # awaited later, if at all
            return self._outcome(seq, provisional=False, live=live, pressed=False, level="power")
        kept = _Kept(loop=loop)
        if (group := self._unsynced.get(loop)) is None:
            group = self._unsynced[loop] = []
            loop.call_soon(self._sync, loop)
        group.append((seq, live, kept))
        return kept

    def _sync(self, loop: asyncio.AbstractEventLoop) -> None:
        group = self._unsynced.pop(loop)

        def settle(error: Exception | None) -> None:
            mailbox.unsubscribe(token)
            for _, live, kept in group:
                if kept.done():  # cancelled meanwhile
                    continue
                if error is None:
                    kept.set_result(live)
                else:
                    kept.set_exception(error)

        mailbox = Mailbox.current()
        token = mailbox.subscribe(settle)
        try:
            self._await_synced(mailbox.core, token, group[0][0], group[-1][0])
        except BroadcastError as error:  # this process is a fork
            settle(error)

    def _retry(self, event: Any, durability: Durability | None) -> _Outcome:
        """Make what ``safe_emit`` returns when memory is at its hard limit and the policy is to wait."""

        async def retry() -> bool:
            await self._room()
            again = self.safe_emit(event, durability=durability)
            outcome.is_accepted = getattr(again, "is_accepted", True)
            return await again

        outcome = _Outcome(retry, is_accepted=False)
        return outcome

    async def _room(self) -> None:
        mailbox = Mailbox.current()
        reply = mailbox.reply()
        self._when_room(mailbox.core, reply.token)
        await reply.wait()

    def _inject(self, letter: tuple[bytes, float]) -> None:
        """Hand a report to the log and to the health bus."""
        body, unix = letter
        report: dict[str, Any] = orjson.loads(body)
        report["timestamp"] = datetime.fromtimestamp(unix, timezone.utc).isoformat()
        content = report["content"]
        log = logger.info if content["success"] else logger.warning
        about = {"event_type": content["event_type"], "metrics": content["metrics"]}
        log("%s: %s", content["event_type"], content["metrics"], extra=about)
        if self.health_bus is None:
            return
        if len(self._reports) >= _MAX_REPORTS:
            logger.error("the health bus is busy with %d reports; this one is dropped", len(self._reports))
            return
        try:
            outcome = self.health_bus.inject(report)
        except Exception:
            logger.exception("the health bus failed")
            return
        if inspect.isawaitable(outcome):
            task = asyncio.ensure_future(outcome)
            self._reports.add(task)
            task.add_done_callback(self._injected)

    def _injected(self, task: asyncio.Future[Any]) -> None:
        self._reports.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the health bus failed", exc_info=error)


_living: weakref.WeakSet[SafeBroadcaster] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Whatever was not stopped: send for a moment, all together, then leave the rest in the spill."""
    deadline = time.monotonic() + _EXIT_DEADLINE
    for broadcaster in list(_living):
        with contextlib.suppress(BroadcastError):  # a disk that refuses: nobody is left to tell
            broadcaster._stop_blocking(max(0.0, deadline - time.monotonic()))


os.register_at_fork(after_in_child=_living.clear)  # they are the parent's
