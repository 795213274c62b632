"""Sparse emits: what a lone event costs the caller when everything it touches has gone to sleep.

In one loop, one after the other, each after the same pause: an empty coroutine, a bare `os.eventfd_write` to a
sleeping thread, and `await safe_emit(event)`. The pause is what makes emits dear (caches are cold, the thread and its
CPU sleep), so a ratio to a warm loop would say nothing; the eventfd shows what waking a thread costs here in any way.

The sleeping thread is that of a child process: one of this process would fight the writer for the interpreter's lock.
Also counted: how often the emitter's own thread went to sleep for each burst, by the kernel's count (one
for the burst and one for its confirmation would be the least). It must not grow with the size of the burst.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.event import pool
from kit.ours import Ours
from kit.processes import pin_client, sink
from kit.rounds import Figures, empty, options, percentile, run

SLEEPER = "import os, sys\nwhile True: os.eventfd_read(int(sys.argv[1]))"
THREAD = "sb-emitter"


async def main(args: object) -> None:
    figures = Figures("sparse", loop=args.loop, layout=args.layout)
    with sink(args.layout) as port, sleeping_thread() as bell:
        client = Ours()
        await client.open(f"ws://127.0.0.1:{port}/")
        await asyncio.sleep(1)
        idle = switches()
        await asyncio.sleep(2)
        figures.add("nothing emitted", "sleeps of the emitter's thread per second", (switches() - idle) / 2)
        for gap_ms in (1, 5, 20, 50):
            samples = max(20, min(args.samples, int(args.seconds * 1000 / gap_ms / 3)))
            for at_once in (1, 20):
                label = f"{at_once} each {gap_ms} ms"
                times, sleeps = await measure(client, bell, gap_ms / 1000, at_once, samples)
                for case, spent in times.items():
                    figures.add(f"{case}, {label}", "p50 µs", percentile(spent, 0.5))
                    figures.add(f"{case}, {label}", "p99 µs", percentile(spent, 0.99))
                figures.add(f"safe_emit, {label}", "sleeps of the emitter's thread per burst", sleeps)
        await client.close()
    figures.print()


@contextmanager
def sleeping_thread() -> Iterator[int]:
    """A thread that sleeps until the eventfd that this gives is written to, and then sleeps again."""
    bell = os.eventfd(0)
    sleeper = subprocess.Popen([sys.executable, "-c", SLEEPER, str(bell)], pass_fds=[bell])
    try:
        yield bell
    finally:
        sleeper.kill()
        sleeper.wait()
        os.close(bell)


async def measure(client: Ours, bell: int, pause: float, at_once: int, samples: int) -> tuple[dict, float]:
    """Microseconds of the first call after each pause, by case; and the emitter's sleeps for each of its bursts."""

    async def ring(_: dict) -> None:
        os.eventfd_write(bell, 1)

    cases = {"empty async def": empty, "eventfd_write": ring, "safe_emit": client.emit}
    times: dict[str, list[float]] = {case: [] for case in cases}
    before = switches()
    for event in pool(samples):
        for case, function in cases.items():
            await asyncio.sleep(pause)
            start = time.perf_counter_ns()
            await function(event)
            times[case].append((time.perf_counter_ns() - start) / 1e3)
            for _ in range(at_once - 1):
                await function(event)
    assert await client.broadcaster.drain(10), "not all was confirmed"
    return times, (switches() - before) / samples


def switches() -> int:
    """How often the emitter's thread has gone to sleep."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == THREAD:
            status = (task / "status").read_text()
            return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    raise RuntimeError(f"no thread is named {THREAD}")


if __name__ == "__main__":
    chosen = options(
        __doc__,
        rounds=1,
        quick_rounds=1,
        samples=(1000, 50, "emits at each gap, at most"),
        seconds=(10, 1, "seconds at each gap, at most"),
    )
    pin_client(chosen.layout)
    run(main(chosen), chosen.loop)
