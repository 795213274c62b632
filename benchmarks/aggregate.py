"""What a program saves by looking less often in quiet times, and what a queue before its emitter costs it.

1. looks: 278 events a second, which is a million an hour, while activity is looked at on three scales, with fixed
   intervals and with those that follow it, in turns (`roles/aggregating.py`, a process for each). Quiet all the time,
   active for a fifth of it, and active all the time, where following it means looking twice as often.
2. flood: the same with a million events in half a minute, where they cost more than the looks.
3. recovery: an emitter that is down, with the breaker's cooldown shortened to 2 s; the time from its being back until
   the events that waited are emitted, and that none was lost.
"""

import asyncio
import time

from kit.processes import answer, client_cpus, pin_client, process, role
from kit.rounds import Figures, options, run

PROFILES = {"quiet": "quiet", "bursts": "active a fifth of the time", "busy": "active all the time"}
COOLDOWN = 2.0


async def main(args: object) -> None:
    looking = Figures("aggregate", loop=args.loop, layout=args.layout, rate=args.rate)
    flood = Figures("aggregate", loop=args.loop, layout=args.layout, rate=args.events // args.seconds)
    recovering = Figures("aggregate", loop=args.loop, layout=args.layout)
    for _ in range(args.rounds):
        for profile in PROFILES:
            turn(looking, profile, args.rate * args.seconds, args)
        turn(flood, "bursts", args.events, args)
        await recovery(recovering)
    for figures in (looking, flood):
        figures.print()
        mine, theirs = (f"{how}, {PROFILES['bursts']}" for how in ("adaptive", "fixed"))
        figures.check("aggregate_cpu", figures.ratios(mine, theirs, "CPU %"))
        figures.check("aggregate_memory", figures.ratios(mine, theirs, "MB"))
        figures.check("aggregate_latency", figures.of(mine, "p99 ms"))
    recovering.print()
    recovering.check("aggregate_recovery", recovering.of("emitter that was down", "s, cooldown 2 s"))


def turn(figures: Figures, profile: str, events: int, args: object) -> None:
    for how in ("fixed", "adaptive"):
        with process(role("aggregating", how, profile, events, args.seconds), client_cpus(args.layout)) as child:
            measured = answer(child)
        case = f"{how}, {PROFILES[profile]}"
        figures.add(case, "CPU %", 100 * measured["cpu"] / measured["wall"])
        figures.add(case, "looks", measured["looks"])
        figures.add(case, "MB", measured["mb"])
        for part in ("p50", "p99", "max"):
            figures.add(case, f"{part} ms", measured[part] * 1e3)


async def recovery(figures: Figures) -> None:
    """The seconds until an emitter that was down has had everything, from when it was back."""
    from safe_broadcaster import CircuitBreakers, EmitterQueue  # noqa: PLC0415 as in the roles

    down, emitted = True, 0

    async def emit(_: object) -> None:
        nonlocal emitted
        if down:
            raise ConnectionError("down")
        emitted += 1

    breakers = CircuitBreakers(cooldown_period=COOLDOWN)
    queue = EmitterQueue({"sink": emit}, maxsize=10_000, breakers=breakers, base_delay=0.01, max_delay=0.1)
    for number in range(1000):
        queue.put_nowait({"number": number})
    while not breakers["sink"].tripped:  # noqa: ASYNC110 a breaker has no bell
        await asyncio.sleep(0.01)
    down, back = False, time.monotonic()
    assert await queue.drain(60), "it did not recover"
    assert emitted == 1000, "events were lost"
    figures.add("emitter that was down", "s, cooldown 2 s", time.monotonic() - back)
    await queue.stop()


if __name__ == "__main__":
    chosen = options(
        __doc__,
        rounds=3,
        quick_rounds=1,
        rate=(278, 278, "events a second of the first part"),
        events=(1_000_000, 50_000, "events of the second"),
        seconds=(30, 3, "of each run"),
    )
    pin_client(chosen.layout)
    run(main(chosen), chosen.loop)
