"""The link is down and events go to SQLite: the caller's time, the loop's stalls, the rate, memory, the flush.

1. caller: bursts as in `caller.py`, towards a port where nobody listens.
2. stall: a task that ticks each millisecond while another emits, 100 events at a time; how late was the latest tick? In
   turns with a control run in which the other task calls `orjson.dumps` instead.
3. bulk: a fresh process emits 1 000 000 events, until all are stored; then a sink appears on the port and the time runs
   from the first event that arrives to the last. In turns with `sqlite_floor`, which stores, reads and deletes the same
   events with nothing around SQLite. Memory is that process's, over an interpreter that has imported only orjson.
"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson

from kit.event import pool
from kit.ours import broadcaster, start_offline
from kit.processes import HERE, answer, ask, client_cpus, closed_port, pin_client, process, role, sink, tell, tool
from kit.rounds import Figures, Spent, empty, options, run, timed, timed_call
from kit.sink import sink_count
from kit.stored import until_stored

MB = 1 << 20


async def main(args: object) -> None:
    figures = Figures("spill", loop=args.loop, layout=args.layout)
    out = HERE / "out"
    out.mkdir(exist_ok=True)
    # Not in the system's temporary folder, which may be in memory.
    with tempfile.TemporaryDirectory(dir=out) as folder:
        offline = broadcaster(f"ws://127.0.0.1:{closed_port()}/", Path(folder) / "spill.db")
        await start_offline(offline)
        await caller(figures, offline, args)
        await stall(figures, offline, args)
        await offline.stop(drain_timeout=0)
        for number in range(args.bulk_rounds):
            await bulk(figures, Path(folder), number, args)
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


async def caller(figures: Figures, offline: object, args: object) -> None:
    events = pool(args.burst)
    for _ in range(args.rounds):
        cases = {"safe_emit": [], "orjson.dumps": [], "empty async def": []}
        for _ in range(args.bursts):
            cases["safe_emit"].append(await timed(offline.safe_emit, events))
            await until_stored(offline)
            cases["orjson.dumps"].append(timed_call(orjson.dumps, events))
            cases["empty async def"].append(await timed(empty, events))
        for case, spent in cases.items():
            mean = Spent(*(sum(part) / len(part) for part in zip(*spent, strict=True)))
            figures.add(case, "wall ns/event", mean.wall)
            figures.add(case, "cpu ns/event", mean.cpu)


async def stall(figures: Figures, offline: object, args: object) -> None:
    async def dumps(event: dict) -> bool:
        orjson.dumps(event)
        return True

    events = pool(1000)
    for _ in range(args.rounds):
        for case, emit in {"emitting": offline.safe_emit, "control": dumps}.items():
            figures.add(case, "worst tick ms", await worst_tick(emit, events, args.stall_ms / 1e3))
            await until_stored(offline)


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


async def bulk(figures: Figures, folder: Path, number: int, args: object) -> None:
    port = closed_port()
    name = folder / f"bulk-{number}"
    filler = role("filler", f"ws://127.0.0.1:{port}/", f"{name}.db", args.events, args.loop)
    with process(role("base_memory")) as child:
        base = answer(child)["rss"]
    with process(filler, client_cpus(args.layout)) as child:
        filled = answer(child)
        with sink(args.layout, port):
            listening = time.perf_counter()
            async with sink_count(port) as count:
                tell(child, flush=True)
                await count.reaches(1)
                began = time.perf_counter()
                arrived = await count.reaches(args.events)
                ended = time.perf_counter()
        assert arrived.count == args.events, f"{arrived.count} arrived of {args.events}"
        after = ask(child, memory=True)
    figures.add("spill", "events/s in", args.events / filled["seconds"])
    figures.add("spill", "events/s out", args.events / (ended - began))
    figures.add("spill", "flush s", ended - began)
    figures.add("spill", "s from a reachable sink to the first event", began - listening)
    figures.add("spill", "MB over base", (filled["rss"] - base) / MB)
    figures.add("spill", "MB over base, peak", (filled["peak"] - base) / MB)
    figures.add("spill", "MB over base, after the flush", (after["rss"] - base) / MB)
    figures.add(
        "spill", "MB of the interpreter before the package is imported, over base", (filled["before"] - base) / MB
    )
    floor = await sqlite_floor(folder, args)
    figures.add("plain SQLite", "events/s in", floor["insert_per_s"])
    figures.add("plain SQLite", "events/s out", floor["read_delete_per_s"])


async def sqlite_floor(folder: Path, args: object) -> dict:
    lines = folder / "events.jsonl"
    lines.write_bytes(b"\n".join(map(orjson.dumps, pool(1000))))
    with process(
        [tool("sqlite_floor"), "--events", str(lines), "--db", str(folder / "floor.db"), "--rows", str(args.events)]
    ) as child:
        return answer(child)


if __name__ == "__main__":
    chosen = options(
        __doc__,
        rounds=15,
        bulk_rounds=(3, 1, "rounds of the bulk part"),
        burst=(2000, 500, "events in a burst"),
        bursts=(5, 2, "bursts in a round"),
        stall_ms=(1000, 200, "milliseconds of emitting in a round of the stall part"),
        events=(1_000_000, 50_000, "events of the bulk part"),
    )
    pin_client(chosen.layout)
    run(main(chosen), chosen.loop)
