"""An event loop whose clock jumps to the next timer: an hour of heartbeats takes a millisecond and is never flaky."""

from __future__ import annotations

import asyncio
import functools
import selectors
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


class _Selector(selectors.DefaultSelector):
    """Where the loop would sleep, its clock is set forward instead."""

    clock = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:  # no timer: only a thread can go on
            return super().select(10)
        ready = super().select(0)
        if not ready and timeout > 0:
            self.clock += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module. Threads still take real time, in which the clock may run ahead."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.clock


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in such a loop; fail it if it leaves tasks behind."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        loop = VirtualLoop()
        try:
            loop.run_until_complete(test(*args, **kwargs))
            assert not asyncio.all_tasks(loop), "tasks are left"
        finally:
            loop.close()

    return run


def now() -> float:
    return asyncio.get_running_loop().time()
