"""What an awaited event survives, level by level. Processes are really killed; see also ``chaos``."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from support import NOWHERE, PlainServer, event, eventually, numbers
from test_process import run, spawn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from safe_broadcaster import SafeBroadcaster
    from safe_broadcaster.config import Durability

    Make = Callable[..., SafeBroadcaster]

EMITTER = """
async def main():
    b = SafeBroadcaster(sys.argv[2], path, durability=sys.argv[3], outbox_bytes=1 << 20, **QUICK)
    {start}
    n = 0
    while True:
        n += 1
        await b.safe_emit(event(n, pad="x" * (n * 37 % 900)))
        os.write(1, b"%d\\n" % n)  # returned
asyncio.run(main())
"""


def ring_of(path: Path) -> Path:
    return path.with_name(path.name + ".ring")


async def killed_after(*arguments: Any, start: str = "") -> int:
    """`emit_and_die` beside a server that runs in this loop."""
    return await asyncio.to_thread(emit_and_die, *arguments, start=start)


def emit_and_die(count: int, path: Path, url: str, level: Durability, *, start: str) -> int:
    """Run an emitter until so many emits have returned, kill it, and tell how many had."""
    child = spawn(EMITTER.replace("{start}", start or "pass"), path, url, level)
    assert child.stdout is not None
    last = 0
    for line in child.stdout:
        last = int(line)
        if last == count:
            child.send_signal(signal.SIGKILL)
    child.wait()
    child.communicate()
    assert last >= count
    return last


@pytest.mark.parametrize("level", ["process", "power"])
async def test_what_returned_outlives_kill_9_while_nobody_listens(
    make: Make, spill_path: Path, level: Durability
) -> None:
    returned = 0
    for count in (1, 50, 800):
        last = await killed_after(count, spill_path, NOWHERE, level)
        broadcaster = make(NOWHERE, spill_path, outbox_bytes=1 << 20)
        await broadcaster.safe_emit(event(0))
        found = numbers(list(broadcaster.spill))
        lives = [list(range(1, last + 1)), list(range(1, last + 2))]  # the last one may have been on its way
        assert found[returned:-1] in lives, f"{last} had returned"
        assert broadcaster.get_stats()["dropped"] == 0
        returned = len(found)
        await broadcaster.stop(0)
        assert not ring_of(spill_path).exists(), "a clean end leaves nothing in the ring"


async def test_what_returned_is_sent_again_after_a_kill_with_its_old_seq(make: Make, spill_path: Path) -> None:
    async with PlainServer(pongs=False) as deaf:
        last = await killed_after(300, spill_path, deaf.url, "process", start="await b.start()")
    assert ring_of(spill_path).exists()
    async with PlainServer() as server:
        broadcaster = make(server.url, spill_path, stamp=True, outbox_bytes=1 << 20)
        await broadcaster.start(5)
        assert await broadcaster.drain(10)
        assert numbers(server.events)[:last] == list(range(1, last + 1))
        assert [each["_sb"]["seq"] for each in server.events[:last]] == list(range(1, last + 1))
        assert broadcaster.get_stats()["spill_count"] == 0, "they were in the ring, and never in the spill"


async def test_an_emit_before_the_spill_is_open_waits_until_it_is_safe(make: Make, spill_path: Path) -> None:
    broadcaster = make(NOWHERE, spill_path)
    assert broadcaster.get_stats()["epoch"] is None
    assert await broadcaster.safe_emit(event(1)) is False
    assert broadcaster.get_stats()["epoch"] is not None
    assert ring_of(spill_path).exists()
    early = make(NOWHERE)
    assert early.emit_nowait(event(1)) is False
    assert early.get_stats()["epoch"] is not None


async def test_a_broadcaster_in_memory_keeps_no_file_and_takes_over_what_a_killed_one_left(
    make: Make, spill_path: Path
) -> None:
    last = await killed_after(100, spill_path, NOWHERE, "process")
    broadcaster = make(NOWHERE, spill_path, durability="memory")
    await broadcaster.safe_emit(event(0))
    await eventually(lambda: broadcaster.get_stats()["epoch"])
    assert len(numbers(list(broadcaster.spill))) in (last + 1, last + 2)
    assert not ring_of(spill_path).exists()


async def test_an_outbox_of_another_size_is_taken_over(make: Make, spill_path: Path) -> None:
    async with PlainServer(pongs=False) as deaf:
        last = await killed_after(200, spill_path, deaf.url, "process", start="await b.start()")
    broadcaster = make(NOWHERE, spill_path, outbox_bytes=2 << 20)
    await broadcaster.safe_emit(event(0))
    assert numbers(list(broadcaster.spill))[:last] == list(range(1, last + 1))


async def test_the_ring_goes_on_by_itself_when_its_spill_file_is_gone(make: Make, spill_path: Path) -> None:
    async with PlainServer(pongs=False) as deaf:
        last = await killed_after(200, spill_path, deaf.url, "process", start="await b.start()")
    for each in spill_path.parent.glob(f"{spill_path.name}*"):
        if not each.name.endswith(".ring"):
            each.unlink()
    async with PlainServer() as server:
        broadcaster = make(server.url, spill_path, stamp=True, outbox_bytes=1 << 20)
        await broadcaster.start(5)
        assert await broadcaster.drain(10)
        assert [each["_sb"]["seq"] for each in server.events[:last]] == list(range(1, last + 1))


async def test_power_means_that_a_sync_covered_each_event(make: Make, spill_path: Path) -> None:
    broadcaster = make(NOWHERE, spill_path, durability="power")
    assert broadcaster.get_stats()["fsync_p99"] is None
    outcomes = await asyncio.gather(*(broadcaster.safe_emit(event(n)) for n in range(1000)))
    assert outcomes == [False] * 1000
    assert broadcaster.get_stats()["fsync_p99"] > 0
    assert numbers(list(broadcaster.spill)) == list(range(1000))


async def test_power_and_delivered_for_one_call(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    assert broadcaster.get_stats()["fsync_p99"] is None
    assert await broadcaster.safe_emit(event(1)) is True
    assert broadcaster.get_stats()["fsync_p99"] is None, "nobody asked for it"
    assert await broadcaster.safe_emit(event(2), durability="power") is True
    assert broadcaster.get_stats()["fsync_p99"] is not None
    assert await broadcaster.safe_emit(event(3), durability="delivered") is True
    assert numbers(server.events) == [1, 2, 3]


def test_an_emit_at_power_outside_of_a_loop_can_be_awaited_in_one(make: Make, spill_path: Path) -> None:
    broadcaster = make(NOWHERE, spill_path, durability="power")
    broadcaster.emit_nowait(event(0))
    outcome = broadcaster.safe_emit(event(1))
    broadcaster.safe_emit(event(2))  # forgotten
    assert asyncio.run(outcome) is False
    assert numbers(list(broadcaster.spill)) == [0, 1, 2]


async def test_an_emit_at_power_is_sent_though_nobody_awaits_it(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    forgotten = [broadcaster.safe_emit(event(1), durability="power")]
    await eventually(lambda: numbers(server.events) == [1])
    await broadcaster.drain(5)  # asleep
    outside = threading.Thread(target=lambda: forgotten.append(broadcaster.safe_emit(event(2), durability="power")))
    outside.start()
    await eventually(lambda: numbers(server.events) == [1, 2])
    await forgotten[0]
    await forgotten[1]
    outside.join()


async def test_threads_share_their_syncs(make: Make) -> None:
    broadcaster = make(NOWHERE)
    broadcaster.emit_nowait(event(0))

    def work(first: int) -> None:
        for n in range(first, first + 50):
            assert broadcaster.emit_nowait(event(n), durability="power") is False

    threads = [threading.Thread(target=work, args=(first,)) for first in range(100, 900, 100)]
    for thread in threads:
        thread.start()
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    stored = numbers(list(broadcaster.spill))
    assert len(stored) == 401
    assert all(
        [n for n in stored if n // 100 == lane] == list(range(lane * 100, lane * 100 + 50)) for lane in range(1, 9)
    )


async def test_a_cancelled_power_await_loses_nothing(make: Make) -> None:
    broadcaster = make(NOWHERE, durability="power")
    tasks = [asyncio.create_task(broadcaster.safe_emit(event(n))) for n in range(200)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert numbers(list(broadcaster.spill)) == list(range(200))


def test_no_room_for_the_outbox_is_an_error_at_start_that_says_what_is_needed(spill_path: Path) -> None:
    code, lines, err = run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
        async def main():
            b = SafeBroadcaster(NOWHERE, path)
            try:
                await b.start(5)
            except SpillCorrupt as error:
                say(error)
            await b.stop(0)
            async with SafeBroadcaster(NOWHERE, path, durability="memory", **QUICK) as b:
                pass
        try:
            asyncio.run(asyncio.wait_for(main(), 3))
        except asyncio.TimeoutError:
            say("memory waits for its link")
        """,
        spill_path,
    )
    assert code == 0, err
    assert "cannot reserve" in lines[0]
    assert "durability='memory'" in lines[0]
    assert str(ring_of(spill_path)) in lines[0]
    assert lines[1:] == ["memory waits for its link"]
    assert not ring_of(spill_path).exists()
    assert spill_path.exists()
