"""What a process does to a broadcaster: exit, signals, kill, exec, a second process, a restart."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import BroadcasterClosed, SafeBroadcaster, SpillLocked
from scripts import run, running, second_process, spawn, told
from support import NOWHERE, PlainServer, event, eventually, eventually_blocking, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., SafeBroadcaster]

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


def test_daemon_threads_that_emit_at_the_end_lose_nothing_that_returned(make: Make, spill_path: Path) -> None:
    code, lines, err = run(
        """
        b = SafeBroadcaster(NOWHERE, path)
        def work(first):
            n = first
            while True:
                try: b.emit_nowait(event(n))
                except BroadcasterClosed: return
                tell(n)
                n += 1
        for k in range(4): threading.Thread(target=work, args=(1_000_000 * k,), daemon=True).start()
        eventually_blocking(lambda: b.get_stats()["last_seq"] > 500)
        """,
        spill_path,
    )
    assert (code, err) == (0, "")
    assert len(lines) > 100
    kept = numbers(list(make(NOWHERE, spill_path).spill))
    assert told(lines) <= set(kept)
    assert len(set(kept)) == len(kept)


def test_sys_exit_in_a_task_loses_nothing_that_returned(make: Make, spill_path: Path) -> None:
    code, lines, err = run(
        """
        async def quit():
            await asyncio.sleep(0.02)
            sys.exit(3)
        async def main():
            b = SafeBroadcaster(NOWHERE, path, **QUICK)
            starting = asyncio.ensure_future(b.start())
            leaving = asyncio.ensure_future(quit())
            for n in range(1_000_000):
                await b.safe_emit(event(n))
                tell(n)
                if n % 50 == 0: await asyncio.sleep(0)
        import logging; logging.disable()
        asyncio.run(main())
        """,
        spill_path,
    )
    assert (code, err) == (3, "")
    kept = numbers(list(make(NOWHERE, spill_path).spill))
    assert kept == list(range(len(kept)))
    assert told(lines) <= set(kept)


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_sigterm_without_a_handler_ends_at_once_and_what_was_stored_is_there(
    make: Make, spill_path: Path
) -> None:
    with running(
        """
        b = SafeBroadcaster(NOWHERE, path)
        for n in range(50): b.emit_nowait(event(n))
        eventually_blocking(lambda: b.get_stats()["spill_bytes"] > 0 and b.get_stats()["outbox_bytes"] == 0)
        say("stored")
        time.sleep(60)
        """,
        spill_path,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        assert process.wait(5) == -signal.SIGTERM
    assert numbers(list(make(NOWHERE, spill_path).spill)) == list(range(50))


async def test_sigterm_with_a_handler_of_asyncio_stops_in_order(
    make: Make, server: PlainServer, spill_path: Path
) -> None:
    with running(
        """
        async def main():
            over = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
            async with SafeBroadcaster(sys.argv[2], path, **QUICK) as b:
                n = 0
                while not over.is_set():
                    await b.safe_emit(event(n))
                    tell(n)
                    n += 1
                    if n % 20 == 0: await asyncio.sleep(0)
        asyncio.run(main())
        """,
        spill_path,
        server.url,
    ) as process:
        reading = asyncio.create_task(asyncio.to_thread(process.communicate, timeout=20))
        await eventually(lambda: len(server.events) > 100)
        process.terminate()
        out, err = await reading
        assert (process.returncode, err) == (0, "")
        assert numbers(server.events) == sorted(told(out.splitlines()))
    assert list(make(server.url, spill_path).spill) == []


# ── exec ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_program_that_replaces_itself_opens_the_same_files_again(tmp_path: Path) -> None:
    """No descriptor, and so no lock and no port, outlives ``exec``."""
    code, lines, err = run(
        """
        async def main():
            hub = EventBroadcaster(port=int(sys.argv[2]), log_path=path + "/hub.db")
            await hub.start()
            b = SafeBroadcaster(NOWHERE, path + "/spill.db")
            kept = numbers(list(b.spill))
            say(hub.get_stats()["offset"], kept, len(os.listdir("/proc/self/fd")))
            if len(kept) == 3: os._exit(0)
            await hub.broadcast("t", 1)
            b.emit_nowait(event(len(kept)))
            await eventually(lambda: len(b.spill) > len(kept) and b.get_stats()["outbox_bytes"] == 0)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:-1], str(hub.port)])
        asyncio.run(main())
        """,
        tmp_path,
        0,
    )
    assert (code, err) == (0, "")
    said = [line.rsplit(" ", 1) for line in lines]
    assert [words for words, _ in said] == ["0 []", "1 [0]", "2 [0, 1]", "3 [0, 1, 2]"]
    assert len({descriptors for _, descriptors in said}) == 1, "none is left over"


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


async def test_a_lock_file_left_by_the_dead_is_taken_over(make: Make, spill_path: Path) -> None:
    lock = Path(f"{spill_path}.lock")
    lock.write_text("999999999")
    broadcaster = make(NOWHERE, spill_path)
    await broadcaster.safe_emit(event(1))
    await eventually(lambda: broadcaster.get_stats()["epoch"])
    assert lock.read_text().splitlines()[0] == str(os.getpid())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_of_multiprocessing_is_refused_the_parents_file_and_has_its_own(spill_path: Path, method: str) -> None:
    owner = SafeBroadcaster(NOWHERE, spill_path)
    owner.emit_nowait(event(1))
    eventually_blocking(lambda: owner.get_stats()["epoch"])
    child = multiprocessing.get_context(method).Process(target=second_process, args=(str(spill_path), os.getpid()))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert numbers(list(owner.spill)) == [1]
    owner._stop_blocking(0)


# ── cancellation, threads, loops ─────────────────────────────────────────────────────────────────────────────────────


async def test_thousands_of_cancelled_awaits_lose_and_double_nothing(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    rng = random.Random(7)
    called: list[int] = []
    cancelled = 0

    async def emit(n: int) -> None:
        called.append(n)
        await broadcaster.safe_emit(event(n), durability="delivered" if n % 2 else "memory")

    for first in range(0, 12_000, 1000):
        tasks = [asyncio.create_task(emit(n)) for n in range(first, first + 1000)]
        for task in tasks:
            if rng.random() < 0.5:
                task.cancel()
            elif rng.random() < 0.01:
                await asyncio.sleep(0)
        if first % 3000 == 0:
            server.cut()
        cancelled += sum(
            isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True)
        )
    assert cancelled > 1000
    assert await broadcaster.drain(10)
    received = numbers(server.events)
    assert set(received) == set(called), "cancelled before its first step: never called; else: delivered"
    assert list(dict.fromkeys(received)) == called, (
        "in the order of the calls; a plain server may see repetitions after a cut"
    )
    assert broadcaster.get_stats()["last_seq"] == len(called)


@pytest.mark.parametrize("link", ["up", "down"])
async def test_threads_that_emit_during_stop_are_told_the_truth(
    make: Make, server: PlainServer, spill_path: Path, link: str
) -> None:
    broadcaster = make(server.url if link == "up" else NOWHERE, spill_path)
    if link == "up":
        await broadcaster.start(5)
    returned: list[list[int]] = [[] for _ in range(4)]

    def work(k: int) -> None:
        for n in itertools.count(1_000_000 * k):
            try:
                broadcaster.emit_nowait(event(n))
            except BroadcasterClosed:
                return
            returned[k].append(n)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    await eventually(lambda: all(len(each) > 200 for each in returned))
    await asyncio.wait_for(broadcaster.stop(0 if link == "down" else 10), 20)
    for thread in threads:
        await asyncio.to_thread(thread.join, 5)
        assert not thread.is_alive()
    kept = numbers(list(make(NOWHERE, spill_path).spill))
    assert sorted(numbers(server.events) + kept) == sorted(n for each in returned for n in each)


def test_a_loop_that_is_closed_under_a_broadcaster_does_not_take_it_along(spill_path: Path) -> None:
    """The loop ends with awaits and reports under way; another goes on with the same broadcaster."""
    code, lines, err = run(
        """
        import logging; logging.disable()
        class Bus:
            async def inject(self, report): await asyncio.sleep(0.01)
        async def second(b, server):
            await asyncio.wait_for(b.ready.wait(), 5)
            assert await b.safe_emit(event(1000), durability="delivered") is True
            assert await b.drain(5)
            await b.stop()
            say(sorted(set(numbers(server.events))) == [*range(100), 1000])
        def serve(started, over):
            async def main():
                async with PlainServer() as server:
                    started.append(server)
                    while not over.is_set(): await asyncio.sleep(0.01)
            asyncio.run(main())
        started, over = [], threading.Event()
        thread = threading.Thread(target=serve, args=(started, over))
        thread.start()
        eventually_blocking(lambda: started)
        b = SafeBroadcaster(started[0].url, path, Bus(), **QUICK)
        async def begin():
            await b.start(5)
            for n in range(100): b.safe_emit(event(n), durability="delivered")
        loop = asyncio.new_event_loop()
        loop.run_until_complete(begin())
        loop.close()
        asyncio.run(second(b, started[0]))
        over.set()
        thread.join()
        """,
        spill_path,
    )
    assert (code, lines, err) == (0, ["True"], "")


# ── the clock ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_waits_for_the_wall_clock(spill_path: Path) -> None:
    """An administrator may set it back by years: in the Python layer nobody asks it how long something took."""
    code, lines, err = run(
        """
        import logging; logging.disable()  # records carry the time of day
        def forbidden(): raise AssertionError("somebody asks for the time of day")
        async def main():
            async with PlainServer() as server:
                b = SafeBroadcaster(server.url, path, HealthBus(), **QUICK)
                time.time = time.time_ns = forbidden
                await b.start(5)
                assert await b.safe_emit(event(1), durability="delivered")
                server.cut()
                await b.wait_connected(5)
                await b.flush_spill()
                assert await b.drain(5)
                b.get_stats()
                await b.stop()
                async with EventBroadcaster(port=0) as hub: await hub.broadcast("t", 1)
                say("done")
        asyncio.run(main())
        """,
        spill_path,
    )
    assert (code, lines, err) == (0, ["done"], "")


# ── interpreters ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_interpreter_in_the_process_is_refused(spill_path: Path) -> None:
    code, lines, err = run(
        """
        try: import _xxsubinterpreters as interpreters
        except ImportError: import _interpreters as interpreters
        b = SafeBroadcaster(NOWHERE, path)
        b.emit_nowait(event(1))
        other = interpreters.create()
        failure = None
        try: failure = interpreters.run_string(other, "import safe_broadcaster")
        except Exception as error: failure = error
        say("ImportError" in repr(failure) or "ImportError" in str(failure))
        interpreters.destroy(other)
        b.emit_nowait(event(2))
        say(numbers(list(b.spill)))
        """,
        spill_path,
    )
    assert (code, lines, err) == (0, ["True", "[1, 2]"], "")


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
