"""Services start in the order of their needs, a failure undoes what was begun, and everything bad is told by name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time

import pytest

from safe_broadcaster import BootFailed, BootSequence, ConfigError
from virtual import now, virtual


class Log:
    """Notes what happens, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def starts(self, name: str, seconds: float = 0.0, error: BaseException | None = None):
        async def start() -> None:
            self.lines.append(f"+{name}")
            await asyncio.sleep(seconds)
            if error is not None:
                raise error
            self.lines.append(name)

        return start

    def undoes(self, name: str, error: BaseException | None = None):
        async def undo() -> None:
            self.lines.append(f"-{name}")
            await asyncio.sleep(0)
            if error is not None:
                raise error

        return undo

    def add(self, boot: BootSequence, name: str, *needs: str, seconds=0.0, error=None, **more) -> None:
        boot.add(name, self.starts(name, seconds, error), undo=self.undoes(name), depends_on=needs, **more)


@virtual
async def test_each_step_starts_when_those_it_needs_are_ready() -> None:
    log, boot = Log(), BootSequence()
    log.add(boot, "engines", "broadcaster", "schemas")
    log.add(boot, "broadcaster", "hub", seconds=2)
    log.add(boot, "hub", seconds=1)
    log.add(boot, "schemas", seconds=5)
    order = boot.order()
    assert order.index("hub") < order.index("broadcaster") < order.index("engines")
    report = await boot.run()
    assert log.lines == ["+hub", "+schemas", "hub", "+broadcaster", "broadcaster", "schemas", "+engines", "engines"]
    assert report.seconds == pytest.approx(5), "what does not depend on each other starts at the same time"
    assert report.took == pytest.approx({"hub": 1, "broadcaster": 2, "schemas": 5, "engines": 0})
    log.lines.clear()
    await boot.stop()
    assert log.lines == ["-engines", "-broadcaster", "-schemas", "-hub"]
    await boot.stop()
    assert len(log.lines) == 4, "nothing is undone twice"


@virtual
async def test_it_may_run_again_after_its_stop_and_not_before() -> None:
    log, boot = Log(), BootSequence()
    log.add(boot, "a")
    async with boot:
        with pytest.raises(ConfigError, match=r"stop\(\) it before"):
            await boot.run()
    await boot.run()
    assert log.lines == ["+a", "a", "-a", "+a", "a"]
    await boot.stop()


@virtual
async def test_a_second_stop_waits_for_the_first_and_undoes_nothing_twice() -> None:
    boot, stops = BootSequence(), []

    def stop(name: str):
        async def undo() -> None:
            stops.append(name)
            await asyncio.sleep(1)

        return undo

    boot.add("hub", lambda: None, undo=stop("hub"))
    boot.add("engines", lambda: None, undo=stop("engines"), depends_on=["hub"])
    await boot.run()
    await asyncio.gather(boot.stop(), boot.stop())
    assert (stops, now()) == (["engines", "hub"], 2)
    await boot.run()
    stopping = asyncio.create_task(boot.stop())
    await asyncio.sleep(0.5)
    stopping.cancel()
    await asyncio.wait({stopping})
    await boot.stop()
    assert stops[2:] == ["engines", "engines", "hub"], "what was interrupted is undone again"


@virtual
async def test_a_failing_step_undoes_the_earlier_ones_in_reverse_and_says_which_why_and_how_long() -> None:
    log, boot = Log(), BootSequence()
    log.add(boot, "hub", seconds=1)
    log.add(boot, "broadcaster", "hub", seconds=2)
    log.add(boot, "engines", "broadcaster", seconds=0.5, error=OSError("no graph"))
    log.add(boot, "tools", "engines")
    with pytest.raises(BootFailed) as caught:
        await boot.run()
    assert log.lines[-4:] == ["+engines", "-engines", "-broadcaster", "-hub"], "it may have half started"
    assert "+tools" not in log.lines
    error = caught.value
    assert (error.step, error.undone) == ("engines", ("engines", "broadcaster", "hub"))
    assert error.took == pytest.approx({"hub": 1, "broadcaster": 2, "engines": 0.5})
    assert isinstance(error.__cause__, OSError)
    for words in ("'engines'", "0.50 s", "OSError: no graph", "hub 1.00 s", "engines, broadcaster, hub"):
        assert words in str(error)
    log.lines.clear()
    with pytest.raises(BootFailed):
        await boot.run()
    assert "-hub" in log.lines, "it may be tried again"


@virtual
async def test_a_failure_ends_the_steps_that_are_under_way() -> None:
    log, boot = Log(), BootSequence()
    log.add(boot, "slow", seconds=9)
    log.add(boot, "bad", seconds=1, error=ValueError("x"))
    with pytest.raises(BootFailed):
        await boot.run()
    assert log.lines == ["+slow", "+bad", "-bad", "-slow"]
    assert now() == pytest.approx(1)


@virtual
async def test_two_failures_at_once_are_both_told() -> None:
    seen: list[str] = []
    boot = BootSequence(progress=lambda news: seen.append(f"{news.step} {news.state}"))
    for name in ("a", "b"):
        boot.add(name, Log().starts(name, 1, ValueError(name)))
    with pytest.raises(BootFailed, match="'a'"):
        await boot.run()
    assert seen == ["a starting", "b starting", "a failed", "b failed"]


@virtual
async def test_a_cancelled_start_is_undone() -> None:
    log, boot = Log(), BootSequence()
    log.add(boot, "hub")
    log.add(boot, "slow", "hub", seconds=9)
    running = asyncio.create_task(boot.run())
    await asyncio.sleep(3)
    with pytest.raises(ConfigError, match="still starting"):
        await boot.stop()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log.lines[-2:] == ["-slow", "-hub"]


@virtual
async def test_an_undo_that_fails_or_hangs_is_told_and_the_others_are_undone() -> None:
    log, seen = Log(), []
    boot = BootSequence(timeout=2, progress=seen.append)
    boot.add("a", log.starts("a"), undo=log.undoes("a"))
    boot.add("b", log.starts("b"), undo=log.undoes("b", OSError("busy")), depends_on=["a"])
    boot.add("c", log.starts("c"), undo=lambda: asyncio.sleep(1e6), depends_on=["b"])
    await boot.run()
    await boot.stop()
    assert log.lines[-2:] == ["-b", "-a"]
    states = [(news.step, news.state) for news in seen[-3:]]
    assert states == [("c", "undo failed"), ("b", "undo failed"), ("a", "undone")]


class Gate:
    def __init__(self, opens_at: float) -> None:
        self.opens_at = opens_at

    async def wait(self) -> None:
        await asyncio.sleep(self.opens_at - now())


def raising_until(seconds: float):
    def ready() -> bool:
        if now() < seconds:
            raise ConnectionError("refused")
        return True

    return ready


def gates() -> dict[str, object]:
    async def returning() -> None:
        await asyncio.sleep(3)

    async def asked() -> bool:
        return now() >= 3

    return {
        "object": Gate(3),
        "plain": lambda: now() >= 3,
        "asked": asked,
        "returning": returning,
        "raising": raising_until(3),
    }


@pytest.mark.parametrize("kind", sorted(gates()))
@virtual
async def test_a_step_counts_when_its_gate_is_open(kind: str) -> None:
    log, boot = Log(), BootSequence()
    log.add(boot, "hub", ready=gates()[kind])
    log.add(boot, "engines", "hub")
    report = await boot.run()
    assert report.took["hub"] == pytest.approx(3, abs=0.1)
    assert log.lines == ["+hub", "hub", "+engines", "engines"]


@virtual
async def test_a_gate_that_stays_shut_fails_its_step_at_the_timeout_and_tells_what_it_raised() -> None:
    log, boot = Log(), BootSequence(timeout=4)
    log.add(boot, "hub", ready=raising_until(1e6))
    with pytest.raises(BootFailed, match=r"'hub' failed after 4\.00 s.*not ready within 4 s.*ConnectionError: refused"):
        await boot.run()
    assert log.lines == ["+hub", "hub", "-hub"]


@virtual
async def test_a_start_that_hangs_and_heeds_no_cancellation_holds_nothing_up() -> None:
    over = asyncio.Event()

    async def stubborn() -> None:
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await over.wait()

    boot = BootSequence(timeout=4)
    boot.add("hub", stubborn, timeout=2)
    with pytest.raises(BootFailed, match="not ready within 2 s"):
        await boot.run()
    assert now() < 4
    over.set()
    await asyncio.sleep(0.01)


@virtual
async def test_a_step_that_cancels_itself_is_a_failure_and_no_cancellation_of_the_boot() -> None:
    async def suicide() -> None:
        raise asyncio.CancelledError

    boot = BootSequence()
    boot.add("hub", suicide)
    with pytest.raises(BootFailed, match="cancelled from within"):
        await boot.run()


@virtual
async def test_a_timeout_of_the_steps_own_is_told_as_it_is() -> None:
    boot = BootSequence()
    boot.add("hub", Log().starts("hub", 0, TimeoutError("no link in 1 s")))
    with pytest.raises(BootFailed, match="TimeoutError: no link in 1 s"):
        await boot.run()


def test_a_plain_function_that_blocks_is_told_of(caplog) -> None:
    @virtual
    async def boots() -> None:
        boot = BootSequence()
        boot.add("schemas", blocks)
        await boot.run()
        await boot.stop()

    def blocks() -> None:
        until = time.monotonic() + 0.15
        while time.monotonic() < until:
            pass
        asyncio.get_running_loop()._virtual.clock += 0.15

    caplog.set_level(logging.WARNING, "safe_broadcaster.boot")
    boots()
    assert any("'schemas' held up the event loop" in record.message for record in caplog.records)


@virtual
async def test_services_are_objects_with_start_and_stop_or_context_managers_too() -> None:
    lines = []

    class Service:
        def start(self) -> None:
            lines.append("start")

        async def stop(self) -> None:
            lines.append("stop")

    class Manager:
        async def __aenter__(self) -> None:
            lines.append("enter")

        async def __aexit__(self, *_: object) -> None:
            lines.append("exit")

    class Shut(Manager):
        async def __aenter__(self) -> None:
            raise OSError("shut")

    boot = BootSequence()
    boot.add("a", Service())
    boot.add("b", Manager(), depends_on=["a"])
    async with boot:
        assert lines == ["start", "enter"]
    assert lines == ["start", "enter", "exit", "stop"]
    boot.add("c", Shut(), depends_on=["b"])
    with pytest.raises(BootFailed, match="shut"):
        await boot.run()
    assert lines[4:] == ["start", "enter", "exit", "stop"], "what was not entered is not left"


@virtual
async def test_progress_is_shown_line_by_line_and_its_failure_harms_nothing() -> None:
    lines = []
    boot = BootSequence(progress=lambda news: lines.append(str(news)))
    log = Log()
    log.add(boot, "hub", seconds=1)
    log.add(boot, "engines", "hub", seconds=0.5)
    await boot.run()
    await boot.stop()
    assert lines == [
        "[1/2] hub: starting",
        "[1/2] hub: ready after 1.00 s",
        "[2/2] engines: starting",
        "[2/2] engines: ready after 0.50 s",
        "[2/2] engines: undone after 0.00 s",
        "[1/2] hub: undone after 0.00 s",
    ]
    bad = BootSequence(progress=lambda _: 1 / 0)
    log.add(bad, "hub")
    await bad.run()
    await bad.stop()


def test_wrong_steps_are_refused_by_name() -> None:
    boot = BootSequence()
    boot.add("hub", print)
    with pytest.raises(ConfigError, match=r"name='hub'.*already"):
        boot.add("hub", print)
    with pytest.raises(ConfigError, match=r"depends_on='hub' is not allowed: .*\['hub'\]"):
        boot.add("x", print, depends_on="hub")
    for wrong in (None, 7, object()):
        with pytest.raises(ConfigError, match=r"service=.* of step 'x' is not allowed"):
            boot.add("x", wrong)
    for gate in (7, threading.Event()):
        with pytest.raises(ConfigError, match="ready="):
            boot.add("x", print, ready=gate)
    with pytest.raises(ConfigError, match="undo=7"):
        boot.add("x", print, undo=7)
    for timeout in (0, -1, float("nan"), float("inf"), "5", True):
        with pytest.raises(ConfigError, match="timeout="):
            boot.add("x", print, timeout=timeout)
        with pytest.raises(ConfigError, match="timeout="):
            BootSequence(timeout=timeout)
    assert boot.order() == ["hub"], "what was refused is no step"
    for progress in (7, asyncio.sleep):
        with pytest.raises(ConfigError, match="progress="):
            BootSequence(progress=progress)


@virtual
async def test_a_step_that_would_never_start_is_refused() -> None:
    boot = BootSequence()

    @boot.step("hub")
    def hub() -> None:
        with pytest.raises(ConfigError, match="has run already"):
            boot.add("too late", print)

    await boot.run()
    with pytest.raises(ConfigError, match="has run already"):
        boot.add("too late", print)
    await boot.stop()
    boot.add("in time for the next run", print)


@virtual
async def test_unknown_needs_and_circles_are_named_before_anything_starts() -> None:
    log, boot = Log(), BootSequence()
    log.add(boot, "engines", "broadcastr")
    log.add(boot, "broadcaster")
    with pytest.raises(
        ConfigError, match=r"'engines' depends on 'broadcastr', which is no step; there are engines, broad"
    ):
        await boot.run()
    boot = BootSequence()
    log.add(boot, "a", "c")
    log.add(boot, "b", "a")
    log.add(boot, "c", "b")
    with pytest.raises(ConfigError, match=r"circle: (a → c → b → a|b → a → c → b|c → b → a → c)"):
        await boot.run()
    selfish = BootSequence()
    log.add(selfish, "a", "a")
    with pytest.raises(ConfigError, match=r"circle: a → a"):
        selfish.order()
    assert log.lines == []


@virtual
async def test_steps_may_be_decorated_functions_and_gates_never_answer_none() -> None:
    boot, lines = BootSequence(), []

    @boot.step("schemas")
    def schemas() -> None:
        lines.append("schemas")

    @boot.step("hub", depends_on=["schemas"], ready=lambda: None)
    async def hub() -> None:
        lines.append("hub")

    with pytest.raises(BootFailed, match="returned None; let it return True or False"):
        await boot.run()
    assert lines == ["schemas", "hub"]
