"""Calls functions that users have given, thousands a second: async ones on the loop, plain ones in a thread.

What takes too long is cancelled, and what holds up the loop is named in the log. Unlike `safe_broadcaster.deadlines`
this costs no task for each call, and waits for the end of what it has cancelled.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from safe_broadcaster import _core
from safe_broadcaster.deadlines import Aside
from safe_broadcaster.exceptions import HandlerTimeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

__all__ = ["Handler", "call", "is_async", "name_of"]

logger = logging.getLogger(__name__)

BLOCKED = 0.25
"""Seconds in one step of a coroutine from which on it has held up the loop: people notice, and sockets pile up."""

MOST_HANGING = 100
"""Threads that may be left to themselves; where so many hang, calls wait, as their number must have a bound."""

_hanging: list[Aside] = []


def name_of(function: object) -> str:
    """Return how a function is called in logs."""
    if isinstance(function, functools.partial):
        return name_of(cast("functools.partial[Any]", function).func)
    name: str = getattr(function, "__qualname__", None) or type(function).__qualname__
    return name.rpartition("<locals>.")[2]


def is_async(function: object) -> bool:
    """Whether it is to be called on the event loop."""
    of_an_emitter = isinstance(getattr(function, "__self__", None), _core.Emitter)  # safe_emit never blocks
    return of_an_emitter or any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004 - the method itself is looked at


async def call(function: Callable[..., Any], *arguments: object, timeout: float | None = None) -> Any:
    """Call a function once: as a `Handler` does, but one that hangs is not waited for.

    Raises:
        HandlerTimeout: It took longer. A plain function is left to itself in its thread.
        RuntimeError: As `Handler`.
        Exception: What the function raises.

    """
    return await Handler(function, timeout, waits=False)(*arguments)


class Handler:
    """A function that is called again and again.

    Args:
        function: Async, or plain: that runs in a thread of its own.
        timeout: Seconds that a call may take. None: any.
        waits: Whether the end of a plain function that takes longer is waited for.

    """

    __slots__ = ("_is_async", "_waits", "function", "timeout")

    def __init__(self, function: Callable[..., Any], timeout: float | None = None, *, waits: bool = True) -> None:
        self.function = function
        self.timeout = timeout
        self._waits = waits
        self._is_async = is_async(function)

    async def __call__(self, *arguments: object) -> Any:
        """Call it and wait for its result.

        Raises:
            HandlerTimeout: An async function took longer; it was cancelled. A plain one cannot be: that it still runs
                is logged, and its end is waited for, so that at most one thread hangs for each caller; unless ``waits``
                is False.
            RuntimeError: It was cancelled from within, which must not look as if the caller were.
            Exception: What the function raises.

        """
        if self._is_async:
            return await _Watched(self.function, self.function(*arguments), self.timeout)
        result = await self._in_thread(arguments)
        if inspect.isawaitable(result):  # a plain function that makes a coroutine
            return await _Watched(self.function, result, self.timeout)
        return result

    async def _in_thread(self, arguments: tuple[object, ...]) -> Any:
        made: list[object] = []  # what it returns is looked at by whoever waits for it here

        def plain() -> None:
            made.append(self.function(*arguments))

        aside = Aside(plain, f"safe_broadcaster {name_of(self.function)}")
        running = asyncio.ensure_future(aside())
        try:
            done, _ = await asyncio.wait({running}, timeout=self.timeout)
            if not done:
                self._give_up(aside)
            await running
        finally:
            running.cancel()  # whoever is cancelled waits no more; the thread cannot be stopped
        return made[0]

    def _give_up(self, aside: Aside) -> None:
        """Raise, unless the end of a plain function that takes too long is waited for."""
        name = name_of(self.function)
        _hanging[:] = [each for each in _hanging if each.is_running()]
        if self._waits or len(_hanging) >= MOST_HANGING:
            logger.error("%s still runs in its thread after %s s; it is waited for", name, self.timeout)
            return
        _hanging.append(aside)
        raise HandlerTimeout(f"{name} did not return within {self.timeout} s; its thread is left to itself")


class _Watched:
    """Awaits something step by step: a step that blocks the loop is told, and a timer cancels what hangs.

    A timer is armed only for what suspends. So a handler that never does costs no more than a few calls.
    """

    __slots__ = ("_awaitable", "_expired", "_function", "_timeout")

    def __init__(self, function: object, awaitable: Awaitable[Any], timeout: float | None) -> None:
        self._function = function
        self._awaitable = awaitable
        self._timeout = timeout
        self._expired = False

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = _as_coroutine(self._awaitable).__await__()
        value: Any = None
        error: BaseException | None = None
        timer: asyncio.TimerHandle | None = None
        before = _cancellations()
        try:
            while True:
                began = perf_counter()
                try:
                    waits_for = steps.send(value) if error is None else steps.throw(error)
                except StopIteration as end:
                    return end.value
                finally:
                    self._tell_if_blocked(perf_counter() - began)
                if timer is None and self._timeout is not None:
                    timer = self._arm(self._timeout)
                value = error = None
                try:
                    value = yield waits_for
                except GeneratorExit:
                    steps.close()
                    raise
                except BaseException as thrown:  # noqa: BLE001 - it belongs to the awaited one
                    error = thrown
        except asyncio.CancelledError as cancelled:
            reason = self._reason(before)
            if reason is None:
                raise
            raise reason from cancelled
        finally:
            if timer is not None:
                timer.cancel()
            if self._expired:
                _uncancel()

    def _reason(self, before: int | None) -> Exception | None:
        """Return what a cancellation means to the caller: None if it is the caller that is cancelled."""
        now = _cancellations()
        if now is not None and before is not None and now - self._expired > before:
            return None
        if self._expired:
            return HandlerTimeout(
                f"{name_of(self._function)} did not return within {self._timeout} s and was cancelled"
            )
        if now is None:  # before Python 3.11 nobody can tell
            return None
        return RuntimeError(f"{name_of(self._function)} was cancelled from within")

    def _arm(self, timeout: float) -> asyncio.TimerHandle:
        task = asyncio.current_task()
        assert task is not None, "only tasks run handlers"

        def expire() -> None:
            self._expired = True
            task.cancel()

        return asyncio.get_running_loop().call_later(timeout, expire)

    def _tell_if_blocked(self, seconds: float) -> None:
        if seconds > BLOCKED:
            logger.warning(
                "%s held up the event loop for %.2f s: await what blocks, or make it a plain function, which runs in a "
                "thread",
                name_of(self._function),
                seconds,
            )


def _cancellations() -> int | None:
    """Return how often the running task was cancelled by others and not taken back; None where Python does not tell."""
    cancelling = getattr(asyncio.current_task(), "cancelling", None)  # new in Python 3.11
    return None if cancelling is None else cancelling()


def _uncancel() -> None:
    """Take the timer's cancellation back, which a TaskGroup of the next handler would take for one of its own."""
    uncancel = getattr(asyncio.current_task(), "uncancel", None)
    if uncancel is not None:
        uncancel()


def _as_coroutine(awaitable: Awaitable[Any]) -> Awaitable[Any]:
    """Return something whose steps can be taken one by one."""
    if inspect.iscoroutine(awaitable) or isinstance(awaitable, asyncio.Future):
        return awaitable

    async def wait() -> Any:
        return await awaitable

    return wait()
