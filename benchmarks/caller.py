"""Caller's time: what one `await safe_emit(event)` costs the program that calls it, while the link is live.

Compared in turns with `orjson.dumps` of the same events, which any emitter has to pay, and with awaiting an empty
`async def`, which any awaited call has to pay. Two ways of emitting:

* burst: a burst, then a pause until all of it has been confirmed. What the caller pays when it is not flooding.
* flood: as many as it takes to fill every buffer on the way. Includes the backpressure the caller is given.

Wall time is what the target is about; the calling thread's CPU time stands beside it, as it varies less on a busy
machine.
"""

import itertools

import orjson

from kit.event import pool
from kit.ours import Ours
from kit.processes import pin_client, sink
from kit.rounds import Figures, empty, options, run, timed, timed_call
from kit.sink import sink_count


async def main(args: object) -> None:
    events = pool(args.burst)
    flood = list(itertools.islice(itertools.cycle(events), args.flood))
    figures = Figures("caller", loop=args.loop, layout=args.layout)

    with sink(args.layout) as port:
        client = Ours()
        await client.open(f"ws://127.0.0.1:{port}/")
        emit, drain = client.emit, client.broadcaster.drain
        sent = 0
        async with sink_count(port) as count:
            for _ in range(args.rounds):
                bursts = {"safe_emit, burst": [], "orjson.dumps": [], "empty async def": []}
                for _ in range(args.bursts):
                    bursts["safe_emit, burst"].append(await timed(emit, events))
                    assert await drain(10), "the burst was not confirmed"
                    bursts["orjson.dumps"].append(timed_call(orjson.dumps, events))
                    bursts["empty async def"].append(await timed(empty, events))
                for case, spent in bursts.items():
                    figures.add_spent(case, spent)
                figures.add_spent("safe_emit, flood", [await timed(emit, flood)])
                assert await drain(30), "the flood was not confirmed"
                figures.add_spent("orjson.dumps, flood", [timed_call(orjson.dumps, flood)])
                sent += args.bursts * len(events) + len(flood)
                arrived = (await count.reaches(sent)).count
                assert arrived == sent, f"{sent} sent, {arrived} arrived"
        await client.close()

    figures.print()
    figures.check("caller", figures.ratios("safe_emit, burst", "orjson.dumps", "wall ns/event"), case="burst")
    figures.check("caller", figures.ratios("safe_emit, burst", "orjson.dumps", "cpu ns/event"), case="burst, CPU time")
    figures.check("caller", figures.ratios("safe_emit, flood", "orjson.dumps, flood", "wall ns/event"), case="flood")


if __name__ == "__main__":
    chosen = options(
        __doc__,
        rounds=15,
        burst=(2000, 500, "events in a burst"),
        bursts=(20, 4, "bursts in a round"),
        flood=(200_000, 20_000, "events in a flood"),
    )
    pin_client(chosen.layout)
    run(main(chosen), chosen.loop)
