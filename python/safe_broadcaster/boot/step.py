"""One step: what starts a service, what undoes that, and how it is waited for."""

from __future__ import annotations

import asyncio
import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from safe_broadcaster.boot.progress import told
from safe_broadcaster.calling import is_async, name_of
from safe_broadcaster.deadlines import TimedOut, within
from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Gate", "Step", "how_to_start", "now", "until_ready"]

logger = logging.getLogger("safe_broadcaster.boot")

_ASK_AGAIN = 0.05
"""Seconds between two questions to a gate that is a function: a wait that nobody notices in a start of seconds."""

_BLOCKED = 0.1
"""Seconds from which on a plain function that holds up the event loop is worth a warning."""


class Gate(Protocol):
    """Opens when a service is ready: ``broadcaster.ready``, or an `asyncio.Event`."""

    async def wait(self) -> Any:
        """Return when it is open."""
        ...


@dataclass(frozen=True, eq=False)
class Step:
    """One service of a sequence."""

    name: str
    start: Callable[[], Any]
    undo: Callable[[], Any] | None
    ready: Gate | Callable[[], Any] | None
    depends_on: tuple[str, ...]
    timeout: float


def how_to_start(name: str, service: Any) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """Return what starts a service, and what undoes that by default."""
    if callable(start := getattr(service, "start", None)):
        return start, getattr(service, "stop", None)
    if hasattr(service, "__aenter__") and hasattr(service, "__aexit__"):
        return _entering(service)
    if callable(service):
        return service, None
    raise ConfigError(
        f"service={service!r} of step {name!r} is not allowed: give a function, an object with start(), or an async "
        "context manager"
    )


def _entering(manager: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    entered = False

    async def enter() -> None:
        nonlocal entered
        await manager.__aenter__()
        entered = True

    async def leave() -> None:
        nonlocal entered
        if entered:  # one whose entry failed is not left
            entered = False
            await manager.__aexit__(None, None, None)

    return enter, leave


async def until_ready(step: Step) -> None:
    """Start a step and wait for its gate; raises `TimeoutError` if that takes too long."""
    last: list[Exception] = []

    async def go() -> None:
        began = now()
        outcome = step.start()
        blocked = now() - began
        if blocked > _BLOCKED:
            logger.warning("step %r held up the event loop for %.2f s: use asyncio.to_thread", step.name, blocked)
        if inspect.isawaitable(outcome):
            await outcome
        wait: Callable[[], Any] | None = getattr(step.ready, "wait", None)
        if wait is not None and is_async(wait):
            await wait()
        elif callable(step.ready):
            await _asked(step.ready, last)

    try:
        await within(step.timeout, go())
    except TimedOut:
        why = f"; its gate raised {told(last[0])}" if last else ""
        raise TimeoutError(f"not ready within {step.timeout:g} s{why}") from (last[0] if last else None)


async def _asked(ready: Callable[[], Any], last: list[Exception]) -> None:
    """Ask a gate that is a function until it says yes; ``last`` gets what it raised last."""
    while True:
        try:
            answer = ready()
            if inspect.isawaitable(answer):
                answer = await answer
                answer = True if answer is None else answer
        except Exception as error:  # noqa: BLE001 - not ready yet; told if it never is
            last[:] = [error]
        else:
            last.clear()
            if answer is None:
                raise TypeError(f"the gate {name_of(ready)} returned None; let it return True or False")
            if answer:
                return
        await asyncio.sleep(_ASK_AGAIN)


def now() -> float:
    """Return the seconds of the running loop."""
    return asyncio.get_running_loop().time()
