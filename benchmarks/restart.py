"""What an earlier process left: how long the next one takes until its events are on the wire.

1. ring: a full ring of 64 MiB, as after `kill -9`, is recovered (`ring_recovery`). In turns with reading the same file,
   with CRC32C over everything. The file is in the page cache, as it is after a crash of the process.
2. spill: a process calls `start()` with events in its spill while a sink is listening; the time until the first of them
   is there. With few and with many stored, in turns: it should make no difference. Each start gets a copy of one file.
3. flush: from the first to the last of them, with the file in the page cache and, in turns, dropped from it, which is
   how a backlog is read that is larger than memory: each page from the disk.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import orjson

from kit.event import SIZE, pool
from kit.ours import safe_broadcaster, start_offline
from kit.processes import answer, closed_port, folder_on_disk, pin_client, process, role, sink, tell, tool
from kit.rounds import Figures, options, run
from kit.sink import sink_count
from kit.stored import until_stored

MIB = 64


async def main(args: object) -> None:
    figures = Figures("restart", loop=args.loop, layout=args.layout)
    with folder_on_disk() as folder:
        ring(figures, folder, args.rounds)
        spills = {f"{count} events in the spill": count for count in (1000, args.events)}
        for count in spills.values():
            await prepare(folder / f"{count}.db", count)
        for _ in range(args.starts):
            for case, count in spills.items():
                first, _ = await flush(folder, count, args)
                figures.add(case, "ms from start() to the first event", first * 1e3)
        for _ in range(args.flushes):
            for case, cold in {"flush, file in the page cache": False, "flush, file not in it": True}.items():
                _, seconds = await flush(folder, args.events, args, cold=cold)
                figures.add(case, "events/s", args.events / seconds)
    figures.print()
    figures.check("ring_recovery", figures.ratios("recovered", "read", "ms"))
    few, many = spills
    figures.check("spill_start", figures.ratios(many, few, "ms from start() to the first event"), case=many)


def ring(figures: Figures, folder: Path, rounds: int) -> None:
    lines = folder / "events.jsonl"
    lines.write_bytes(b"\n".join(map(orjson.dumps, pool())))
    command = ["--events", lines, "--ring", folder / "full.ring", "--mib", MIB, "--rounds", rounds]
    with process([tool("ring_recovery"), *map(str, command)]) as child:
        measured = answer(child)
    # What is not events in a ring: their lengths and slots, headers, the rest of a segment in which none fits.
    assert measured["events"] * SIZE > 0.95 * (MIB << 20), f"the ring was not full: {measured['events']} events"
    for case, metric in {"recovered": "recover", "read": "plain"}.items():
        for seconds in measured[metric]:
            figures.add(case, "ms", seconds * 1e3)


async def prepare(path: Path, count: int) -> None:
    """Stores events as a process does that could not send them and was stopped."""
    broadcaster = safe_broadcaster(f"ws://127.0.0.1:{closed_port()}/", path)
    await start_offline(broadcaster)
    events = pool()
    for number in range(count):
        await broadcaster.safe_emit(events[number % len(events)])
    await until_stored(broadcaster)
    await broadcaster.stop(drain_timeout=0)


def copy(path: Path, place: Path) -> None:
    """Puts a database in place of another and of all files that lie beside that."""
    for file in place.parent.glob(f"{place.name}*"):
        file.unlink()
    shutil.copyfile(path, place)
    with place.open("rb+") as made:
        os.fsync(made.fileno())  # or the kernel would write it while we measure


def drop_pages(path: Path) -> None:
    """Has the kernel forget what it holds of a file, and sees to it that it has."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for at in range(0, path.stat().st_size, 64 << 20):
            with suppress(BlockingIOError):  # it would have to be read
                os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT)
                raise RuntimeError(f"{path} is in the page cache still: put TMPDIR on a disk")


async def flush(folder: Path, count: int, args: object, *, cold: bool = False) -> tuple[float, float]:
    """Seconds from `start()` of a process until the first of so many stored events has arrived, and from then until
    the last has.
    """
    path = folder / "copy.db"
    copy(folder / f"{count}.db", path)
    if cold:
        drop_pages(path)
    with (
        sink(args.layout) as port,
        process(role("starter", f"ws://127.0.0.1:{port}/", path, args.loop)) as child,
    ):
        answer(child)
        async with sink_count(port) as arriving:
            tell(child, start=True)
            # The last arrival is seen here; the sink knows how long ago the first was. So nobody asks meanwhile.
            arrived = await arriving.reaches(count)
            last = time.monotonic()
            assert arrived[:2] == (count, count * SIZE), f"{arrived} of {count} events"
        began = answer(child)["began"]
    return last - arrived.seconds - began, arrived.seconds


if __name__ == "__main__":
    chosen = options(
        __doc__,
        rounds=15,
        starts=(9, 3, "rounds of the spill part"),
        flushes=(7, 2, "rounds of the flush part"),
        events=(1_000_000, 50_000, "events in the larger spill"),
    )
    pin_client(chosen.layout)
    run(main(chosen), chosen.loop)
