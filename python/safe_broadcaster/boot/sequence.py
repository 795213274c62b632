"""The sequence: who starts when, and what is undone."""

from __future__ import annotations

import asyncio
import graphlib
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from safe_broadcaster.boot.progress import BootProgress, BootReport, told
from safe_broadcaster.boot.step import Gate, Step, how_to_start, now, until_ready
from safe_broadcaster.calling import is_async, name_of
from safe_broadcaster.checks import check_callable, check_seconds
from safe_broadcaster.deadlines import call_here, within
from safe_broadcaster.exceptions import BootFailed, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["BootSequence"]

logger = logging.getLogger("safe_broadcaster.boot")

F = TypeVar("F", bound="Callable[..., Any]")


class BootSequence:
    """See the package. One for each event loop; may run again after `stop`.

    Args:
        timeout: Seconds that each step may take until it is ready, and its undoing too, unless it has a timeout of its
            own. Default 10: seed 000 wants the whole system up in that time.
        progress: Called with a `BootProgress` for everything that happens, for instance ``print``. It is in the log in
            any case.

    Raises:
        ConfigError: The timeout is not above 0, or the progress is no plain function.

    """

    def __init__(self, *, timeout: float = 10.0, progress: Callable[[BootProgress], object] | None = None) -> None:
        check_seconds("timeout", timeout)
        self._timeout = timeout
        if progress is not None:
            check_callable("progress", progress)
            if is_async(progress):
                raise ConfigError(
                    f"progress={name_of(progress)} is not allowed: give a plain function, as nobody waits for it"
                )
        self._progress = progress
        self._steps: dict[str, Step] = {}
        self._begun: list[Step] = []
        self._took: dict[str, float] = {}
        self._running = False
        self._undoing = asyncio.Lock()

    def add(
        self,
        name: str,
        service: object,
        *,
        depends_on: Iterable[str] = (),
        ready: Gate | Callable[[], Any] | None = None,
        undo: Callable[[], Any] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Add a step.

        Args:
            name: Its name, for `depends_on`, for progress and for errors.
            service: What starts it: a function without arguments, async or plain; an object with ``start()``, whose
                ``stop()``, if there is one, undoes it (a hub, a broadcaster, a `Heartbeat`, `BackgroundTasks`); or an
                async context manager. A plain function runs in the event loop: one that blocks belongs into
                `asyncio.to_thread`.
            depends_on: Names of steps that must be ready before. They may be added later.
            ready: The gate behind which it counts as ready: an object with an async ``wait()``, or a function that is
                asked every 50 ms until it returns True. One that raises is not ready yet. An async one may also simply
                return (None) when it is ready. None: ready as soon as it has started.
            undo: Undoes it, async or plain, also after a start that failed half-way. Default: see ``service``.
            timeout: Seconds until it must be ready. Default: that of the sequence.

        Raises:
            ConfigError: The name is taken, the service is none of these, the timeout is not above 0, or it has run.

        """
        if self._running or self._begun:
            raise ConfigError(
                f"name={name!r} is not allowed now: the boot sequence has run already; add all steps before"
            )
        if name in self._steps:
            raise ConfigError(f"name={name!r} is not allowed: there is such a step already; give each its own name")
        if isinstance(depends_on, str):
            raise ConfigError(f"depends_on={depends_on!r} is not allowed: give a sequence of names, [{depends_on!r}]")
        start, stop = how_to_start(name, service)
        if ready is not None and not (is_async(getattr(ready, "wait", None)) or callable(ready)):
            raise ConfigError(f"ready={ready!r} is not allowed: give an object with an async wait(), or a function")
        if undo is not None:
            check_callable("undo", undo)
        limit = self._timeout if timeout is None else timeout
        check_seconds("timeout", limit)
        self._steps[name] = Step(name, start, undo or stop, ready, tuple(depends_on), limit)

    def step(
        self,
        name: str,
        *,
        depends_on: Iterable[str] = (),
        ready: Gate | Callable[[], Any] | None = None,
        undo: Callable[[], Any] | None = None,
        timeout: float | None = None,
    ) -> Callable[[F], F]:
        """Decorate the function that starts a step; arguments and errors are those of `add`."""

        def decorate(function: F) -> F:
            self.add(name, function, depends_on=depends_on, ready=ready, undo=undo, timeout=timeout)
            return function

        return decorate

    def order(self) -> list[str]:
        """Return the names in an order in which each step comes after those that it needs.

        Raises:
            ConfigError: A step depends on one that does not exist, or on itself by way of others.

        """
        return list(self._sorter().static_order())

    async def run(self) -> BootReport:
        """Start all steps; returns when all are ready.

        If one fails, nothing more is started, and everything that has begun, the failed step included, is undone in
        reverse order. The same happens if the await is cancelled.

        Raises:
            BootFailed: A step failed; says which, why, and how long each took. Its cause is what the step raised.
            ConfigError: As `order`; or it has run already and was not stopped.

        """
        sorter = self._sorter()
        if self._running or self._begun:
            raise ConfigError("this boot sequence has run already; stop() it before it runs again")
        self._running = True
        self._undoing = asyncio.Lock()  # it belongs to the loop in which it was waited for
        self._took = {}
        sorter.prepare()
        began = now()
        under_way: dict[asyncio.Task[None], Step] = {}
        failed: Step | None = None
        try:
            while sorter.is_active():
                for name in sorted(sorter.get_ready(), key=list(self._steps).index):
                    step = self._steps[name]
                    self._begun.append(step)
                    under_way[asyncio.create_task(self._start(step), name=f"boot: {name}")] = step
                done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: self._begun.index(under_way[task])):
                    failed = under_way[task]
                    task.result()
                    del under_way[task]
                    sorter.done(failed.name)
                    failed = None
        except BaseException as error:
            undone = await self._give_up(under_way)
            if failed is None or not isinstance(error, Exception):
                raise
            raise self._failure(failed, error, undone) from error
        finally:
            self._running = False
        report = BootReport(now() - began, dict(self._took))
        logger.info("boot complete in %.2f s", report.seconds, extra={"took": dict(report.took)})
        return report

    async def stop(self) -> None:
        """Undo all steps in reverse order. What one of them raises is logged, and the others are undone all the same.

        A second call waits for the end of the first. One that is cancelled leaves the rest to the next call.

        Raises:
            ConfigError: It is still starting; cancel `run`, which then undoes what has begun.

        """
        if self._running:
            raise ConfigError("this boot sequence is still starting; cancel run() instead, which undoes what has begun")
        await self._undo_all()

    async def __aenter__(self) -> Self:
        await self.run()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _sorter(self) -> graphlib.TopologicalSorter[str]:
        for step in self._steps.values():
            for needed in step.depends_on:
                if needed not in self._steps:
                    known = ", ".join(self._steps)
                    raise ConfigError(f"step {step.name!r} depends on {needed!r}, which is no step; there are {known}")
        graph = {step.name: step.depends_on for step in self._steps.values()}
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            circle = " → ".join(reversed(error.args[1]))
            raise ConfigError(
                f"steps depend on each other in a circle: {circle}; one of them must do without"
            ) from None
        return graphlib.TopologicalSorter(graph)

    async def _start(self, step: Step) -> None:
        began = now()
        self._tell(BootProgress(step.name, "starting", *self._place(step), 0.0))
        try:
            await until_ready(step)
        except BaseException as error:
            self._took[step.name] = now() - began
            if isinstance(error, Exception):
                self._tell(BootProgress(step.name, "failed", *self._place(step), self._took[step.name], error))
            raise
        self._took[step.name] = now() - began
        self._tell(BootProgress(step.name, "ready", *self._place(step), self._took[step.name]))

    async def _give_up(self, under_way: Iterable[asyncio.Task[None]]) -> list[str]:
        """End the steps that are under way, then undo all that has begun; returns what was undone."""
        others = [task for task in under_way if not task.done()]
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others)
        for task in under_way:
            if not task.cancelled():
                task.exception()  # in the progress already
        return await self._undo_all()

    async def _undo_all(self) -> list[str]:
        undone: list[str] = []
        async with self._undoing:
            while self._begun:
                step = self._begun[-1]
                if step.undo is not None and await self._undo(step, step.undo):
                    undone.append(step.name)
                self._begun.pop()
        return undone

    async def _undo(self, step: Step, undo: Callable[[], Any]) -> bool:
        began = now()
        place = self._place(step)
        try:
            await within(step.timeout, call_here(undo))
        except Exception as error:  # noqa: BLE001 - logged; the others must be undone all the same
            self._tell(BootProgress(step.name, "undo failed", *place, now() - began, error))
            return False
        self._tell(BootProgress(step.name, "undone", *place, now() - began))
        return True

    def _failure(self, step: Step, error: Exception, undone: list[str]) -> BootFailed:
        took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._took.items())
        what = f"step {step.name!r} failed after {self._took[step.name]:.2f} s: {told(error)}"
        return BootFailed(
            f"{what}. Undone, in this order: {', '.join(undone) or 'nothing'}. Took: {took}",
            step=step.name,
            took=dict(self._took),
            undone=tuple(undone),
        )

    def _place(self, step: Step) -> tuple[int, int]:
        return self._begun.index(step) + 1, len(self._steps)

    def _tell(self, news: BootProgress) -> None:
        extra = {"step": news.step, "state": news.state, "seconds": news.seconds}
        if news.error is None:
            logger.info("%s", news, extra=extra)
        else:
            logger.error("%s", news, extra=extra, exc_info=news.error)
        if self._progress is not None:
            try:
                self._progress(news)
            except Exception:
                logger.exception("progress=%s failed", name_of(self._progress))
