"""The link is down and events go to SQLite: the caller's time, the loop's stalls, the rate, memory, the flush.

1. caller: bursts as in `caller.py`, towards a port where nobody listens.
2. stall: a task that ticks each millisecond while another emits, 100 events at a time; how late was the latest tick? In
   turns with a control run in which the other task calls `orjson.dumps` instead.
3. bulk: a fresh process emits 1 000 000 events, until all are stored; then a sink appears on the port and the time runs
   from the first event that arrives to the last. In turns with `sqlite_floor`, which stores, reads and deletes the same
   events with nothing around SQLite. Memory is that process's, over an interpreter that has imported only orjson.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import orjson

from kit.event import SIZE, pool
from kit.ours import safe_broadcaster, start_offline
from kit.processes import (
    answer,
    ask,
    client_cpus,
    closed_port,
    folder_on_disk,
    pin_client,
    process,
    role,
    sink,
    tell,
    tool,
)
from kit.rounds import Figures, empty, options, run, timed, timed_call
from kit.sink import sink_count
from kit.stored import until_stored
from safe_broadcaster import SafeBroadcaster

MB = 1 << 20


async def main(args: object) -> None:
    figures = Figures("spill", loop=args.loop, layout=args.layout)
    with folder_on_disk() as folder:
        async with offline(folder) as broadcaster:
            await caller(figures, broadcaster, args)
        for _ in range(args.stall_rounds):
            async with offline(folder) as broadcaster:
                await stall(figures, broadcaster, args)
        for _ in range(args.bulk_rounds):
            await bulk(figures, folder, args)
    figures.print()
    ratio = figures.ratios
    figures.check("caller_spilling", ratio("safe_emit", "orjson.dumps", "wall ns/event"), case="burst")
    figures.check("caller_spilling", ratio("safe_emit", "orjson.dumps", "cpu ns/event"), case="burst, CPU time")
    late, control = (figures.of(case, "worst tick ms") for case in ("emitting", "control"))
    figures.check("stall", [worst - usual for worst, usual in zip(late, control, strict=True)])
    figures.check("spill_rate", ratio("spill", "plain SQLite", "events/s in"))
    figures.check("flush_rate", ratio("spill", "plain SQLite", "events/s out"))
    figures.check("flush_time", figures.of("spill", "flush s"))
    figures.check("memory", figures.of("spill", "MB over base"))


@asynccontextmanager
async def offline(folder: Path) -> AsyncIterator[SafeBroadcaster]:
    """A broadcaster with an empty spill and nobody to send to."""
    path = folder / "offline.db"
    broadcaster = safe_broadcaster(f"ws://127.0.0.1:{closed_port()}/", path)
    await start_offline(broadcaster)
    yield broadcaster
    dropped = broadcaster.get_stats()["dropped"]
    await broadcaster.stop(drain_timeout=0)
    remove(path)
    assert dropped == 0, f"{dropped} events were dropped"


def remove(path: Path) -> None:
    """Removes a database with the files that SQLite keeps beside it."""
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


async def caller(figures: Figures, broadcaster: SafeBroadcaster, args: object) -> None:
    events = pool(args.burst)
    for _ in range(args.rounds):
        cases = {"safe_emit": [], "orjson.dumps": [], "empty async def": []}
        for _ in range(args.bursts):
            cases["safe_emit"].append(await timed(broadcaster.safe_emit, events))
            await until_stored(broadcaster)
            cases["orjson.dumps"].append(timed_call(orjson.dumps, events))
            cases["empty async def"].append(await timed(empty, events))
        for case, spent in cases.items():
            figures.add_spent(case, spent)


async def stall(figures: Figures, broadcaster: SafeBroadcaster, args: object) -> None:
    async def dumps(event: dict) -> bool:
        orjson.dumps(event)
        return True

    events = pool(1000)
    for case, emit in {"emitting": broadcaster.safe_emit, "control": dumps}.items():
        figures.add(case, "worst tick ms", await worst_tick(emit, events, args.stall_ms / 1e3))
        await until_stored(broadcaster)


async def worst_tick(emit: Callable[[dict], Awaitable], events: list[dict], seconds: float) -> float:
    """How late, in ms, the latest tick of a 1 ms ticker was while events were emitted for that long."""
    late = 0.0

    async def ticker() -> None:
        nonlocal late
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late = max(late, time.perf_counter() - due)

    ticking = asyncio.create_task(ticker())
    await asyncio.sleep(0.005)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for event in events[:100]:
            await emit(event)
        await asyncio.sleep(0)
    ticking.cancel()
    return late * 1e3


async def bulk(figures: Figures, folder: Path, args: object) -> None:
    port = closed_port()
    path = folder / "bulk.db"
    filler = role("filler", f"ws://127.0.0.1:{port}/", path, args.events, args.loop)
    with process(role("base_memory")) as child:
        base = answer(child)["rss"]
    with process(filler, client_cpus(args.layout)) as child:
        filled = answer(child)
        with sink(args.layout, port):
            listening = time.perf_counter()
            async with sink_count(port) as count:
                tell(child, flush=True)
                arrived = await count.reaches(args.events)
                reached = time.perf_counter() - listening
        assert arrived[:2] == (args.events, args.events * SIZE), f"{arrived} of {args.events} events"
        after = ask(child, memory=True)
    figures.add("spill", "events/s in", args.events / filled["seconds"])
    figures.add("spill", "events/s out", args.events / arrived.seconds)
    figures.add("spill", "flush s", arrived.seconds)
    figures.add("spill", "s from a reachable sink to the last event", reached)
    figures.add("spill", "MB over base", (filled["rss"] - base) / MB)
    figures.add("spill", "MB over base, peak", (filled["peak"] - base) / MB)
    figures.add("spill", "MB over base, after the flush", (after["rss"] - base) / MB)
    figures.add(
        "spill", "MB of the interpreter before the package is imported, over base", (filled["before"] - base) / MB
    )
    remove(path)
    floor = sqlite_floor(folder, args.events)
    figures.add("plain SQLite", "events/s in", floor["insert_per_s"])
    figures.add("plain SQLite", "events/s out", floor["read_delete_per_s"])


def sqlite_floor(folder: Path, rows: int) -> dict:
    """Plain SQLite with the same events."""
    lines, db = folder / "events.jsonl", folder / "floor.db"
    lines.write_bytes(b"\n".join(map(orjson.dumps, pool())))
    with process([tool("sqlite_floor"), "--events", str(lines), "--db", str(db), "--rows", str(rows)]) as child:
        return answer(child)


if __name__ == "__main__":
    chosen = options(
        __doc__,
        rounds=15,
        bulk_rounds=(3, 1, "rounds of the bulk part"),
        burst=(2000, 500, "events in a burst"),
        bursts=(5, 2, "bursts in a round"),
        stall_rounds=(7, 3, "rounds of the stall part"),
        stall_ms=(1000, 200, "milliseconds of emitting in a round of the stall part"),
        events=(1_000_000, 50_000, "events of the bulk part"),
    )
    pin_client(chosen.layout)
    run(main(chosen), chosen.loop)
