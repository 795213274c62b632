"""What durability costs: the levels beside each other, and beside what the disk costs anybody.

1. bursts: as in `caller.py`, by a broadcaster at `memory` and one at `process`.
2. gathered: `asyncio.gather` of 1000 emits at `power`, beside plain Python that appends the same events to a file,
   calls `fdatasync` once, and resolves and gathers 1000 futures.
3. threads: `emit_nowait` from 1 and from 4 threads, each thousandth event at `power`, which covers all before it;
   beside as many threads that append to a file and call `fdatasync` after each thousandth.
4. alone: one event at a time, each waited for; beside one append and `fdatasync` of a file, and beside other queues.

The link is live, and what was emitted is confirmed before the next is measured. All files lie on the same disk.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import orjson

from kit.event import SIZE, pool
from kit.ours import Ours
from kit.processes import folder_on_disk, pin_client, sink
from kit.queues import QUEUES
from kit.rounds import Figures, options, percentile, run, timed, timed_call
from kit.servers import UnavailableError
from kit.sink import sink_count

GROUP = 1000
"""Events that one `fdatasync` covers, where many share one."""
THREADS = (1, 4)


async def main(args: object) -> None:
    figures = Figures("durable", loop=args.loop, layout=args.layout)
    with folder_on_disk() as folder, sink(args.layout) as port:
        url = f"ws://127.0.0.1:{port}/"
        ours, memory = Ours(folder), Ours(folder, durability="memory")
        await ours.open(url)
        await memory.open(url)
        async with sink_count(port) as count:
            sent = 0
            for part in (partial(bursts, memory), gathered, threads, alone):
                sent += await part(ours, figures, folder, args)
                arrived = (await count.reaches(sent)).count
                assert arrived == sent, f"{sent} sent, {arrived} arrived"
        await ours.close()
        await memory.close()

    figures.print()
    ratio = figures.ratios
    for metric, case in {"wall ns/event": "burst", "cpu ns/event": "burst, CPU time"}.items():
        figures.check("process_memory", ratio("safe_emit, process", "safe_emit, memory", metric), case=case)
        figures.check("process_dumps", ratio("safe_emit, process", "orjson.dumps", metric), case=case)
    figures.check("power_gathered", ratio("gather of safe_emit, power", "file and futures", "events/s"))
    for n in THREADS:
        case = in_threads(n)
        figures.check("power_threads", ratio(f"emit_nowait{case}", f"file{case}", "events/s"), case=case.strip(", "))
    for case in ("await safe_emit", "emit_nowait"):
        figures.check("power_alone", ratio(f"{case} · power", "append, fdatasync · power", "p50 µs"), case=case)


async def bursts(memory: Ours, ours: Ours, figures: Figures, _: Path, args: object) -> int:
    events = pool(args.burst)
    levels = {"safe_emit, memory": memory, "safe_emit, process": ours}
    for _ in range(args.rounds):
        spent = {case: [] for case in (*levels, "orjson.dumps")}
        for _ in range(args.bursts):
            for case, client in levels.items():
                spent[case].append(await timed(client.emit, events))
                await confirmed(client)
            spent["orjson.dumps"].append(timed_call(orjson.dumps, events))
        for case, parts in spent.items():
            figures.add_spent(case, parts)
    return args.rounds * args.bursts * len(events) * len(levels)


async def gathered(ours: Ours, figures: Figures, folder: Path, args: object) -> int:
    events = pool(GROUP)

    async def emits() -> None:
        await asyncio.gather(*(ours.emit(event, durability="power") for event in events))

    async def writes(file: BinaryIO) -> None:
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in events]
        append(file, events)
        for future in futures:
            future.set_result(True)
        await asyncio.gather(*futures)

    with log(folder, args.rounds * args.groups * GROUP) as file:
        cases = {"gather of safe_emit, power": emits, "file and futures": partial(writes, file)}
        for _ in range(args.rounds):
            for case, work in cases.items():
                began = time.perf_counter()
                for _ in range(args.groups):
                    await work()
                figures.add(case, "events/s", args.groups * GROUP / (time.perf_counter() - began))
                await confirmed(ours)
    return args.rounds * args.groups * GROUP


async def threads(ours: Ours, figures: Figures, folder: Path, args: object) -> int:
    events = pool(GROUP)
    emit = ours.broadcaster.emit_nowait

    def emits() -> None:
        for _ in range(args.groups):
            for event in events[:-1]:
                emit(event)
            emit(events[-1], durability="power")

    def writes(file: BinaryIO) -> None:
        for _ in range(args.groups):
            append(file, events)

    total = 0
    for n in THREADS:
        share = n * args.groups * GROUP
        with log(folder, args.rounds * share) as file, ThreadPoolExecutor(n) as workers:
            cases = {"emit_nowait": emits, "file": partial(writes, file)}
            for _ in range(args.rounds):
                for case, work in cases.items():
                    began = time.perf_counter()
                    for done in [workers.submit(work) for _ in range(n)]:
                        done.result()
                    figures.add(case + in_threads(n), "events/s", share / (time.perf_counter() - began))
                    await confirmed(ours)
        total += args.rounds * share
    return total


async def alone(ours: Ours, figures: Figures, folder: Path, args: object) -> int:
    events = pool(args.lone)
    emit_nowait = ours.broadcaster.emit_nowait

    async def nowait(event: dict) -> None:
        emit_nowait(event, durability="power")

    emits = {
        "await safe_emit · process": ours.emit,
        "await safe_emit · power": partial(ours.emit, durability="power"),
        "emit_nowait · power": nowait,
    }
    kept = args.rounds * len(events)
    async with AsyncExitStack() as stack:
        file = stack.enter_context(log(folder, kept))

        async def write(event: dict) -> None:
            append(file, [event])

        puts = {**emits, "append, fdatasync · power": write}
        queues = {}
        for case, opened in QUEUES.items():
            try:
                queues[case] = await stack.enter_async_context(opened(folder))
            except UnavailableError as why:  # noqa: PERF203 five of them
                figures.skip(case, why)
        puts |= {case: queue.put for case, queue in queues.items()}
        for _ in range(args.rounds):
            for case, put in puts.items():
                spent = await each(put, events)
                await confirmed(ours)
                figures.add(case, "p50 µs", percentile(spent, 0.5))
                figures.add(case, "p99 µs", percentile(spent, 0.99))
        for case, queue in queues.items():
            assert (found := await queue.count()) == kept, f"{case}: {found} of {kept}"
    return len(emits) * kept


async def each(put: Callable[[dict], Awaitable], events: list[dict]) -> list[float]:
    """Microseconds of each put."""
    spent = []
    for event in events:
        began = time.perf_counter_ns()
        await put(event)
        spent.append((time.perf_counter_ns() - began) / 1e3)
    return spent


def append(file: BinaryIO, events: list[dict]) -> None:
    file.writelines(map(orjson.dumps, events))
    file.flush()
    os.fdatasync(file.fileno())


@contextmanager
def log(folder: Path, count: int) -> Iterator[BinaryIO]:
    """A plain file, in which so many events have to be in the end."""
    path = folder / "plain.log"
    with path.open("wb") as file:
        yield file
    assert path.stat().st_size == count * SIZE, f"{path.stat().st_size / SIZE} of {count} events in the file"
    path.unlink()


async def confirmed(client: Ours) -> None:
    assert await client.broadcaster.drain(30), "not all was confirmed"


def in_threads(n: int) -> str:
    return f", {n} thread{'s' if n > 1 else ''}"


if __name__ == "__main__":
    chosen = options(
        __doc__,
        rounds=15,
        burst=(2000, 500, "events in a burst"),
        bursts=(20, 4, "bursts in a round"),
        groups=(10, 3, "times 1000 events in a round, for each thread"),
        lone=(100, 20, "lone events of each kind in a round"),
    )
    pin_client(chosen.layout)
    run(main(chosen), chosen.loop)
