"""Emits events and looks at activity, for so many seconds. `python -m roles.aggregating LOOKS ACTIVITY EVENTS SECONDS`.

LOOKS `fixed` is the pattern that many programs have: a loop that sleeps for a fixed time and works, an emitter that is
awaited where the event arises. `adaptive` is `Aggregator` with its queue, breaker and adaptive intervals. Both look at
the three scales and do the same work at each look: the largest eigenvalue of a matrix, in plain Python. Both emit the
same events, at a steady rate, into a function that serialises them.

Answers with what it cost: CPU seconds of the process, its largest resident memory, looks, and for each tenth event the
seconds from where it arose to where it was emitted.
"""

import asyncio
import json
import resource
import sys
import time
from importlib import import_module

import orjson

from kit.event import pool
from kit.rounds import percentile

SLICE = 0.01
"""Seconds between two bursts: finer sleeps would cost more than the events."""
SIZE, STEPS = 64, 30
"""Of the matrix, and of the iteration: some 8 ms."""
ON, PERIOD = 3.0, 15.0
"""Seconds of activity in each period, where it comes in bursts."""
MATRIX = [[1.0 / (1 + row + column) for column in range(SIZE)] for row in range(SIZE)]

latencies: list[float] = []
looks: list[float] = []


def activity_of(profile: str) -> float:
    """What is going on now: below all thresholds, or above."""
    return 0.9 if profile == "busy" or (profile == "bursts" and time.monotonic() % PERIOD < ON) else 0.1


def lambda_max() -> float:
    """The work: the largest eigenvalue, by power iteration."""
    vector, value = [1.0] * SIZE, 0.0
    for _ in range(STEPS):
        product = [sum(map(float.__mul__, row, vector)) for row in MATRIX]
        value = max(map(abs, product))
        vector = [each / value for each in product]
    looks.append(value)
    return value


async def emit(stamped: tuple[float, dict] | tuple[None, dict]) -> None:
    """What becomes of an event, with the time at which it arose if it is one to be measured."""
    arose, event = stamped
    orjson.dumps(event)
    if arose is not None:
        latencies.append(time.perf_counter() - arose)


async def fixed(profile: str, events: int, seconds: float) -> None:
    async def look_every(pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            lambda_max()
            activity_of(profile)

    tasks = [asyncio.create_task(look_every(pause)) for pause in (0.1, 10.0, 300.0)]
    await produce(emit, events, seconds)
    for task in tasks:
        task.cancel()


async def adaptive(profile: str, events: int, seconds: float) -> None:
    from safe_broadcaster.aggregator import Aggregator, Outcome  # noqa: PLC0415 imported by `main`

    def aggregate(_window: object, _before: object) -> Outcome:
        lambda_max()
        return Outcome(activity_of(profile), 0.0, {})

    settings = {"event_queue_size": 10_000, "when_full": "wait"}  # a stall of the machine must not end the run
    async with Aggregator(event_emitter=emit, aggregate=aggregate, **settings) as aggregator:
        await produce(aggregator.emit, events, seconds)
        await aggregator.queue.drain()
        lanes = aggregator.get_stats()["queue"]["emitters"].values()
    assert sum(lane["emitted"] for lane in lanes) == events, "an event was lost"


async def produce(emitting, events: int, seconds: float) -> None:
    """Emits so many events at a steady rate, in small bursts."""
    several, began, done = pool(), time.monotonic(), 0
    while done < events:
        await asyncio.sleep(SLICE)
        due = min(events, round((time.monotonic() - began) / seconds * events))
        for number in range(done, due):
            arose = None if number % 10 else time.perf_counter()
            await emitting((arose, several[number % 1000]))
        done = due


def main(how: str, profile: str, events: int, seconds: float) -> None:
    if how == "adaptive":
        import_module("safe_broadcaster.aggregator")  # before the clock runs; `fixed` is without it
    wall, cpu = time.monotonic(), time.process_time()
    asyncio.run({"fixed": fixed, "adaptive": adaptive}[how](profile, events, seconds))
    spent = time.process_time() - cpu
    answer = {
        "cpu": spent,
        "wall": time.monotonic() - wall,
        "looks": len(looks),
        "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "p50": percentile(latencies, 0.5),
        "p99": percentile(latencies, 0.99),
        "max": max(latencies),
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
