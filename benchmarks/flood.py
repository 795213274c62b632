"""End to end: events a second from `await emit(event)` to a sink that counts, until it has confirmed the last one.

Every client sends the same events to the same sink, in turns, and the sink's own count is the proof of arrival: each
event once, and byte for byte as long as it should be. The caller's time includes the backpressure a client gives, so
here it is no more than a remark; `caller.py` measures it.
"""

import itertools
import json
import time

import orjson

from kit.clients import CLIENTS
from kit.event import pool
from kit.processes import pin_client, sink
from kit.rounds import Figures, options, run, timed
from kit.sink import sink_count

# The pattern in use today writes json.dumps with its default separators.
SIZES = {"seed_pattern": lambda event: len(json.dumps(event))}


async def main(args: object) -> None:
    names = args.clients.split(",")
    events = list(itertools.islice(itertools.cycle(pool()), args.events))
    sizes = {name: sum(map(SIZES.get(name, lambda event: len(orjson.dumps(event))), events)) for name in names}
    figures = Figures("flood", loop=args.loop, layout=args.layout)
    with sink(args.layout) as port:
        async with sink_count(port) as count:
            clients = {name: CLIENTS[name]() for name in names}
            for client in clients.values():
                await client.open(f"ws://127.0.0.1:{port}/")
            for _ in range(args.rounds):
                for name, client in clients.items():
                    before = await count.now()
                    wall, cpu = time.perf_counter(), time.process_time()
                    caller = await timed(client.emit, events)
                    arrived = await count.reaches(before.count + len(events), timeout=120)
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    got = (arrived.count - before.count, arrived.bytes - before.bytes)
                    assert got == (len(events), sizes[name]), f"{name}: {got} arrived"
                    figures.add(name, "events/s", len(events) / wall)
                    figures.add(name, "client CPU ns/event", cpu / len(events) * 1e9)
                    figures.add(name, "caller wall ns/event", caller.wall)
            for client in clients.values():
                await client.close()
    figures.print()
    for target, peer in {"flood_seed": "seed_pattern", "flood_picows": "picows_orjson"}.items():
        figures.check(target, figures.ratios("safe_broadcaster", peer, "events/s"))


if __name__ == "__main__":
    chosen = options(
        __doc__,
        rounds=5,
        events=(300_000, 20_000, "events a client sends in a round"),
        clients=(",".join(CLIENTS), ",".join(CLIENTS), "which, in this order"),
    )
    pin_client(chosen.layout)
    run(main(chosen), chosen.loop)
