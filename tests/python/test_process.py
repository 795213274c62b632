"""What a process does to a broadcaster: fork, exit, kill, a second process, a restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import SafeBroadcaster, SpillLocked
from support import NOWHERE, PlainServer, event, eventually, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., SafeBroadcaster]

PRELUDE = """
import asyncio, os, signal, sys, threading, time
from support import *
from safe_broadcaster import *
path = sys.argv[1]
def say(*words): print(*words, flush=True)
"""


def spawn(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a script in a process of its own."""
    code = PRELUDE + textwrap.dedent(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def run(script: str, *arguments: object, timeout: float = 20) -> tuple[int, list[str], str]:
    """The exit code, the lines and the standard error of a script."""
    process = spawn(script, *arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"hangs: {out!r} {err!r}")
    return process.returncode, out.splitlines(), err


# ── exit ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "ending",
    ["", "sys.exit(0)", "raise SystemExit(0)", "threading.Thread(target=lambda: b.emit_nowait(event(99))).start()"],
)
async def test_exit_without_stop_keeps_the_events_and_does_not_hang(make: Make, spill_path: Path, ending: str) -> None:
    code, _, err = run(
        f"""
        b = SafeBroadcaster(NOWHERE, path)
        for n in range(50): b.emit_nowait(event(n))
        {ending}
        """,
        spill_path,
    )
    assert (code, err) == (0, "")
    kept = numbers(list(make(NOWHERE, spill_path).spill))
    assert [n for n in kept if n != 99] == list(range(50))


async def test_exit_in_the_middle_of_everything_is_clean(make: Make, server: PlainServer, spill_path: Path) -> None:
    """Awaits under way, reports under way, a loop that was never closed, many times over."""
    process = spawn(
        """
        async def main():
            class Bus:
                async def inject(self, report): await asyncio.sleep(0.01)
            b = SafeBroadcaster(sys.argv[2], path, Bus(), **QUICK)
            await b.start(5)
            global kept
            kept = [b, [asyncio.ensure_future(b.safe_emit(event(n), durability="delivered")) for n in range(500)]]
            await asyncio.sleep(0.005)
        asyncio.run(main())
        """,
        spill_path,
        server.url,
    )
    await eventually(lambda: process.poll() is not None, 20)
    assert process.stdout
    assert process.stderr
    assert (process.returncode, process.stderr.read()) == (0, "")
    process.stdout.close()
    process.stderr.close()
    heir = make(server.url, spill_path)
    await heir.start(5)
    assert await heir.drain(5)
    assert set(numbers(server.events)) == set(range(500))


def test_exit_with_many_unstopped_broadcasters_waits_once_and_not_for_each(tmp_path: Path) -> None:
    started = time.monotonic()
    code, _, err = run(
        """
        kept = [SafeBroadcaster(NOWHERE, f"{path}/{n}.db") for n in range(8)]
        async def main():
            for b in kept:
                b.emit_nowait(event(1))
                try: await b.start(0.01)
                except ConnectTimeout: pass
        import logging; logging.disable()
        asyncio.run(main())
        """,
        tmp_path,
    )
    assert (code, err) == (0, "")
    assert time.monotonic() - started < 8, "eight times two seconds would be sixteen"


def test_a_failing_script_still_shows_its_own_error(spill_path: Path) -> None:
    code, _, err = run("b = SafeBroadcaster(NOWHERE, path); b.emit_nowait(event(1)); 1 / 0", spill_path)
    assert code == 1
    assert err.rstrip().endswith("ZeroDivisionError: division by zero")


# ── kill and restart ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_restart_recovers_the_events_and_keeps_emitter_epoch_and_seq(
    make: Make, server: PlainServer, spill_path: Path
) -> None:
    identities = []
    for life in range(3):
        broadcaster = make(NOWHERE, spill_path, stamp=True)
        await broadcaster.safe_emit(event(life))
        await eventually(lambda b=broadcaster: b.get_stats()["epoch"])
        stats = broadcaster.get_stats()
        identities.append((stats["emitter"], stats["epoch"], stats["last_seq"]))
        await broadcaster.stop(0)
    assert len({(emitter, epoch) for emitter, epoch, _ in identities}) == 1
    assert [seq for _, _, seq in identities] == [1, 2, 3]
    last = make(server.url, spill_path, stamp=True)
    await last.start(5)
    assert await last.drain(5)
    assert numbers(server.events) == [0, 1, 2]
    assert [each["_sb"]["seq"] for each in server.events] == [1, 2, 3]
    assert {each["_sb"]["epoch"] for each in server.events} == {identities[0][1]}


async def test_after_kill_9_what_was_on_disk_is_delivered_and_no_seq_is_used_twice(
    make: Make, server: PlainServer, spill_path: Path
) -> None:
    process = spawn(
        """
        b = SafeBroadcaster(NOWHERE, path)
        for n in range(200): b.emit_nowait(event(n))
        eventually_blocking(lambda: b.get_stats()["spill_bytes"] > 0 and b.get_stats()["outbox_bytes"] == 0)
        say("stored")
        time.sleep(60)
        """,
        spill_path,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "stored\n"
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    broadcaster = make(server.url, spill_path, stamp=True)
    await broadcaster.start(5)
    await broadcaster.safe_emit(event(200))
    assert await broadcaster.drain(5)
    events = [each for each in server.events if each["type"] != "broadcaster.gap"]
    assert numbers(events) == list(range(201))
    seqs = [each["_sb"]["seq"] for each in events]
    assert seqs[:200] == list(range(1, 201))
    assert seqs[200] > 200


async def test_another_name_is_another_epoch(make: Make, spill_path: Path) -> None:
    epochs = []
    for name in ("ada", "ada", "atlas"):
        broadcaster = make(NOWHERE, spill_path, emitter_id=name)
        await broadcaster.safe_emit(event(0))
        await eventually(lambda b=broadcaster: b.get_stats()["epoch"])
        assert broadcaster.get_stats()["emitter"] == name
        epochs.append(broadcaster.get_stats()["epoch"])
        await broadcaster.stop(0)
    assert epochs[0] == epochs[1] != epochs[2]


# ── a second process ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_second_process_is_refused_and_told_the_owners_pid(make: Make, spill_path: Path) -> None:
    owner = make(NOWHERE, spill_path)
    await owner.safe_emit(event(1))
    await eventually(lambda: owner.get_stats()["epoch"])
    code, lines, err = run(
        """
        async def main():
            b = SafeBroadcaster(NOWHERE, path)
            try: await b.start(5)
            except SpillLocked as error: say(error)
        asyncio.run(main())
        """,
        spill_path,
    )
    assert (code, err) == (0, "")
    assert f"is owned by process {os.getpid()};" in lines[0]
    assert str(spill_path) in lines[0]
    assert numbers(list(owner.spill)) == [1]


async def test_a_killed_owner_frees_the_file(make: Make, spill_path: Path) -> None:
    process = spawn(
        """
        b = SafeBroadcaster(NOWHERE, path)
        b.emit_nowait({})
        eventually_blocking(lambda: b.get_stats()["spill_bytes"])
        say("stored")
        time.sleep(60)
        """,
        spill_path,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    heir = make(NOWHERE, spill_path)
    with pytest.raises(SpillLocked, match=f"process {process.pid};"):
        await heir.start(5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    again = make(NOWHERE, spill_path)
    assert list(again.spill) == [{}]


# ── fork ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

FORK = """
def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            say("child failed:", repr(error))
            os._exit(1)
    return os.waitpid(pid, 0)[1]

async def main():
    b = SafeBroadcaster(NOWHERE, path, **QUICK)
    try: await b.start(0.02)
    except ConnectTimeout: pass
    assert await b.safe_emit(event(1)) is False
"""


def forked(body: str, path: Path) -> None:
    code, lines, err = run(
        "import logging; logging.disable()\n"
        + FORK
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\nasyncio.run(main())",
        path,
    )
    assert (code, err) == (0, ""), lines
    assert lines == ["done"]


def test_a_forked_child_is_told_and_the_parent_goes_on(spill_path: Path) -> None:
    forked(
        """
        def child():
            for use in (
                lambda: b.safe_emit(event(2)), lambda: b.emit_nowait(event(2)), b.get_stats, lambda: b.spill_count,
                lambda: list(b.spill), lambda: asyncio.run(b.start(1)), lambda: asyncio.run(b.stop()),
                lambda: asyncio.run(b.drain(1)), lambda: asyncio.run(b.flush_spill()),
                lambda: asyncio.run(b.ready.wait()),
            ):
                try: use()
                except ForkedProcess as error: assert "make a new one after fork" in str(error)
                else: raise AssertionError("the child was not told")
        assert in_child(child) == 0
        assert await b.safe_emit(event(3)) is False
        assert numbers(list(b.spill)) == [1, 3]
        await b.stop(0)
        say("done")
        """,
        spill_path,
    )


def test_a_forked_child_can_have_a_broadcaster_of_its_own(spill_path: Path) -> None:
    forked(
        """
        def child():
            async def work():
                async with PlainServer() as server:
                    async with SafeBroadcaster(server.url, path + ".child") as own:
                        assert await own.safe_emit(event(7), durability="delivered")
                    assert numbers(server.events) == [7]
            asyncio.run(work())
        assert in_child(child) == 0
        assert in_child(child) == 0
        await b.stop(0)
        say("done")
        """,
        spill_path,
    )


def test_a_forked_child_that_exits_normally_or_collects_harms_nobody(spill_path: Path) -> None:
    forked(
        """
        import gc
        other = SafeBroadcaster(NOWHERE, path + ".other")
        other.emit_nowait(event(1))
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                del other
                gc.collect()
                import atexit
                atexit._run_exitfuncs()
                os._exit(0)
            deadline = time.monotonic() + 5
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                assert time.monotonic() < deadline, "the child hangs"
                time.sleep(0.002)
        assert numbers(list(other.spill)) == [1]
        assert numbers(list(b.spill)) == [1]
        await b.stop(0)
        say("done")
        """,
        spill_path,
    )


def test_a_forked_child_does_not_keep_the_parents_spill_locked(spill_path: Path) -> None:
    forked(
        """
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        await b.stop(0)
        again = SafeBroadcaster(NOWHERE, path)
        assert numbers(list(again.spill)) == [1]
        await again.stop(0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        say("done")
        """,
        spill_path,
    )


# ── several in one process ───────────────────────────────────────────────────────────────────────────────────────────


async def test_two_broadcasters_in_one_process_do_not_mix(make: Make) -> None:
    servers: list[Any] = [PlainServer(), PlainServer()]
    async with servers[0], servers[1]:
        both = [make(server.url) for server in servers]
        for broadcaster in both:
            await broadcaster.start(5)
        for n in range(100):
            for number, broadcaster in enumerate(both):
                assert await broadcaster.safe_emit(event(1000 * number + n)) is True
        for number, (server, broadcaster) in enumerate(zip(servers, both, strict=True)):
            assert await broadcaster.drain(5)
            assert numbers(server.events) == [1000 * number + n for n in range(100)]
        await both[0].stop()
        assert await both[1].safe_emit(event(5000), durability="delivered") is True
        await both[1].stop()
