"""Forks: a child is told, harms nobody, and keeps nothing from whoever comes after its parent."""

from __future__ import annotations

import os
import signal
import socket
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safe_broadcaster import EventBroadcaster, SafeBroadcaster
from scripts import run, running
from support import NOWHERE, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., SafeBroadcaster]

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


def test_multiprocessing_by_fork_is_told_and_harms_nobody(spill_path: Path) -> None:
    code, lines, err = run(
        """
        import multiprocessing
        def child():
            try: b.emit_nowait(event(2))
            except ForkedProcess: sys.exit(7)
        b = SafeBroadcaster(NOWHERE, path)
        b.emit_nowait(event(1))
        children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(5)]
        for each in children: each.start()
        for each in children: each.join(10)
        assert [each.exitcode for each in children] == [7] * 5
        b.emit_nowait(event(3))
        say(numbers(list(b.spill)))
        """,
        spill_path,
    )
    assert (code, lines, err) == (0, ["[1, 3]"], "")


@pytest.mark.parametrize("ending", ["os._exit(0)", "sys.exit(0)", "pass", "b = None; gc.collect(); sys.exit(0)"])
def test_however_a_forked_child_ends_the_parents_file_is_unharmed(spill_path: Path, ending: str) -> None:
    """``pass``: the child runs to the end of the script, and through all that the interpreter does then."""
    code, lines, err = run(
        f"""
        import gc
        b = SafeBroadcaster(NOWHERE, path)
        for n in range(100): b.emit_nowait(event(n))
        eventually_blocking(lambda: b.get_stats()["spill_bytes"] > 0)
        pid = os.fork()
        if pid == 0:
            {ending}
        else:
            deadline = time.monotonic() + 10
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                assert time.monotonic() < deadline, "the child hangs"
                time.sleep(0.002)
            for n in range(100, 200): b.emit_nowait(event(n))
            assert numbers(list(b.spill)) == list(range(200))
            b._stop_blocking(0)
            again = SafeBroadcaster(NOWHERE, path)
            assert numbers(list(again.spill)) == list(range(200))
            again._stop_blocking(0)
            say("done")
        """,
        spill_path,
    )
    assert (code, lines, err) == (0, ["done"], "")


async def test_after_a_kill_a_forked_child_keeps_the_successor_from_nothing(make: Make, spill_path: Path) -> None:
    with running(
        """
        b = SafeBroadcaster(NOWHERE, path)
        b.emit_nowait(event(1))
        eventually_blocking(lambda: b.get_stats()["spill_bytes"] > 0 and b.get_stats()["outbox_bytes"] == 0)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            say("child", os.getpid())
        time.sleep(60)
        """,
        spill_path,
    ) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline().split()[1])
        try:
            parent.kill()
            parent.wait()
            heir = make(NOWHERE, spill_path)
            assert numbers(list(heir.spill)) == [1]
            assert Path(f"{spill_path}.lock").read_text().splitlines()[0] == str(os.getpid())
            os.kill(child, 0)  # it lives
        finally:
            os.kill(child, signal.SIGKILL)


async def test_after_a_kill_a_forked_child_keeps_neither_log_nor_port_from_the_next_hub(tmp_path: Path) -> None:
    log = tmp_path / "hub.db"
    with running(
        """
        async def main():
            hub = EventBroadcaster(port=0, log_path=path)
            await hub.start()
            await hub.broadcast("t", 1)
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                say(hub.port, os.getpid())
                time.sleep(60)
            await asyncio.sleep(60)
        asyncio.run(main())
        """,
        log,
    ) as parent:
        assert parent.stdout
        port, child = map(int, parent.stdout.readline().split())
        try:
            parent.kill()
            parent.wait()
            async with EventBroadcaster(port=port, log_path=log) as heir:
                assert heir.get_stats()["offset"] == 1
                with socket.create_connection(("127.0.0.1", port), 5) as probe:
                    probe.sendall(b"GET /healthz HTTP/1.1\r\nHost: hub\r\n\r\n")
                    assert probe.recv(12) == b"HTTP/1.1 200"
            os.kill(child, 0)  # it lives
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_fork_in_the_middle_of_openings_leaves_no_lock_behind(tmp_path: Path) -> None:
    """One thread opens and stops broadcasters all the time while another forks children that stay."""
    code, lines, err = run(
        """
        over, children, opened = threading.Event(), [], 0
        def open_and_stop():
            global opened
            while not over.is_set():
                b = SafeBroadcaster(NOWHERE, path)
                b.emit_nowait(event(opened))
                b._stop_blocking(0)
                opened += 1
        thread = threading.Thread(target=open_and_stop)
        thread.start()
        for _ in range(60):
            pid = os.fork()
            if pid == 0:
                signal.alarm(30)
                while True: signal.pause()
            children.append(pid)
            time.sleep(0.002)
        over.set()
        thread.join(10)
        assert not thread.is_alive()
        last = SafeBroadcaster(NOWHERE, path)
        assert numbers(list(last.spill)) == list(range(opened)), "with a lock held by a child it could not be opened"
        last._stop_blocking(0)
        def locks(pid):
            links = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
            return [link for link in links if os.path.lexists(link) and ".lock" in os.readlink(link)]
        for pid in children:
            eventually_blocking(lambda: not locks(pid))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        say("done")
        """,
        tmp_path / "spill.db",
    )
    assert (code, lines, err) == (0, ["done"], "")


def test_a_child_can_spill_whatever_the_parents_threads_did_at_the_fork(tmp_path: Path) -> None:
    """SQLite has locks of the whole process; the child would find one locked for ever that another thread had."""
    code, lines, err = run(
        """
        over = threading.Event()
        def spill(path):
            b = SafeBroadcaster(NOWHERE, path, durability="memory")
            for n in range(100): b.emit_nowait(event(n))
            b._stop_blocking(0)
        def spill_on_and_on(path):
            while not over.is_set(): spill(path)
        threads = [threading.Thread(target=spill_on_and_on, args=(path + str(n),)) for n in range(2)]
        for thread in threads: thread.start()
        for _ in range(40):
            pid = os.fork()
            if pid == 0:
                signal.alarm(10)
                spill(path + ".child")
                os._exit(0)
            if status := os.waitpid(pid, 0)[1]: break
        over.set()
        for thread in threads: thread.join()
        say("done" if not status else f"a child hangs: {status}")
        """,
        tmp_path / "spill.db",
    )
    assert (code, lines, err) == (0, ["done"], "")


def test_a_fork_by_a_c_library_is_noticed_too(spill_path: Path) -> None:
    forked(
        """
        import ctypes
        pid = ctypes.PyDLL(None).fork()
        if pid == 0:
            try: b.emit_nowait(event(2))
            except ForkedProcess: os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        await b.stop(0)
        say("done")
        """,
        spill_path,
    )


def test_a_hub_is_refused_in_a_child_and_goes_on_in_the_parent(tmp_path: Path) -> None:
    code, lines, err = run(
        """
        async def main():
            async with EventBroadcaster(port=0, log_path=path) as hub:
                pid = os.fork()
                if pid == 0:
                    try: asyncio.run(hub.broadcast("t", 1))
                    except ForkedProcess: os._exit(7)
                    os._exit(1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
                await hub.broadcast("t", 2)
                with __import__("socket").create_connection(("127.0.0.1", hub.port), 5): pass
                say(hub.get_stats()["offset"])
        asyncio.run(main())
        """,
        tmp_path / "hub.db",
    )
    assert (code, lines, err) == (0, ["1"], "")
