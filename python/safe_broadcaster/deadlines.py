"""Waiting for users' functions no longer than they may take, whatever they do.

Where `calling.call` waits for the end of what it has cancelled, this does not: a step that starts a service, or a
fetch, may heed no cancellation, cancel itself, or hang in its thread for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from safe_broadcaster.exceptions import HandlerTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

__all__ = ["Aside", "TimedOut", "call_here", "end_tasks", "is_alive", "within"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

_GRACE = 1.0
"""Seconds that cancelled work may take to clean up before it is left to itself."""

_LOOK = 0.005
"""Seconds between two looks at what ends on another loop."""

_abandoned: set[asyncio.Future[Any]] = set()
"""Work that has not heeded its cancellation yet; held, because a task that nobody holds may vanish."""


class TimedOut(HandlerTimeout):
    """Work was not done in the time that it was given; other than a timeout of the work's own."""


async def call_here(function: Callable[..., Any], *args: object) -> Any:
    """Call it in the event loop, plain or not, and await what it returns if that can be awaited."""
    result = function(*args)
    return await result if inspect.isawaitable(result) else result


async def within(seconds: float, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
    """Await work for at most so many seconds; it gets a second to heed its cancellation, and is then left to itself.

    Unlike `asyncio.wait_for` this always ends in time, and raises `RuntimeError` where the work cancelled itself.

    Raises:
        TimedOut: It took longer.

    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        await _cancel(task)
        raise
    if not done:
        await _cancel(task)
        raise TimedOut(f"not done within {seconds:g} s")
    if task.cancelled():
        raise RuntimeError("it was cancelled from within")
    return task.result()


def is_alive(task: asyncio.Task[Any] | None) -> bool:
    """Whether a task goes on; one whose loop was closed under it never will."""
    return task is not None and not task.done() and not task.get_loop().is_closed()


async def end_tasks(tasks: Iterable[asyncio.Task[Any]], patience: float | None = None) -> set[asyncio.Task[Any]]:
    """Cancel tasks, whichever loop they are of, and wait for their end; returns those of this loop that do not heed it.

    Args:
        tasks: The tasks; those that are done already are fine.
        patience: Seconds to wait for those of this loop. None: any. Those of others have a second.

    """
    ours: set[asyncio.Task[Any]] = set()
    others: set[asyncio.Task[Any]] = set()
    for task in filter(is_alive, tasks):
        loop = task.get_loop()
        if loop is asyncio.get_running_loop():
            task.cancel()
            ours.add(task)
        else:
            with contextlib.suppress(RuntimeError):  # closed in this moment
                loop.call_soon_threadsafe(task.cancel)
                others.add(task)
    deadline = time.monotonic() + _GRACE
    while others and time.monotonic() < deadline:
        others = {task for task in others if is_alive(task) and task.get_loop().is_running()}
        await asyncio.sleep(_LOOK)  # another loop has no bell for this one
    return (await asyncio.wait(ours, timeout=patience))[1] if ours else set()


async def _cancel(task: asyncio.Future[Any]) -> None:
    _abandoned.add(task)
    task.add_done_callback(_abandoned.discard)
    task.add_done_callback(_tell)
    task.cancel()
    _, undone = await asyncio.wait({task}, timeout=_GRACE)
    if undone:
        logger.error("%r does not heed its cancellation and is left to itself", task)


def _tell(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("work that was cancelled raised %r", error, exc_info=error)


class Aside:
    """Calls a plain function in a thread of its own, so that it may block; never twice at once.

    The thread is a daemon: one that hangs for ever does not keep the program from ending, as the threads of an
    executor would.
    """

    def __init__(self, function: Callable[[], Any], name: str) -> None:
        self._function = function
        self._name = name
        self._thread: threading.Thread | None = None

    def is_running(self) -> bool:
        """Whether a call has not ended."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    async def __call__(self) -> Any:
        """Call it, and await what it returns if that can be awaited."""
        if self.is_running():
            raise TimedOut("the call before has not ended yet")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def run() -> None:
            result: object = None
            error: Exception | None = None
            try:
                result = context.run(self._function)
            except BaseException as raised:  # noqa: BLE001 - it is handed on
                error = raised if isinstance(raised, Exception) else None
                if error is None or isinstance(raised, StopIteration):  # would end the loop, or fit no future
                    error = RuntimeError(f"it raised {raised!r}")
                    error.__cause__ = raised
            self._thread = None  # first: whoever has the result may call again before this thread has quite ended
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_settle, future, result, error)

        self._thread = thread = threading.Thread(target=run, name=self._name, daemon=True)
        thread.start()
        result = await future
        return await result if inspect.isawaitable(result) else result


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():  # given up meanwhile
        if error is not None:
            logger.warning("a call that was given up raised %r", error, exc_info=error)
    elif error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
