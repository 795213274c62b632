"""Hubs that share a stream over one Redis.

1. rate: an emitter at one hub, a subscriber at another, as many events as the emitter can; beside redis-py's XADD, one
   event at a time, into the same Redis.
2. latency: the same path at 1000 events/s; beside redis-py's PUBLISH → SUBSCRIBE of the same events.
3. gap: a hub that is stopped and loses its live messages while 10 000 events go by, one to a block, the dearest form;
   how fast its subscriber gets them once it goes on, beside an XRANGE of as many plain entries in one pipeline.
4. hubs: what Redis pays for an event, with 1 to 16 hubs that all hear of it.

A Redis of its own, without persistence; everything on the same machine. CPU is Redis's.
"""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from subprocess import Popen

import orjson
from redis.asyncio import Redis

from kit.event import event, pool
from kit.processes import answer, ask, closed_port, cpu_seconds, process, role, tell, tool
from kit.rounds import Figures, options, run
from kit.servers import listening, server

SUBSCRIBE = json.dumps({"type": "subscribe", "data": {"events": ["*"]}})
HUBS = (1, 2, 4, 8, 16)


@dataclass
class Bus:
    """A Redis that runs here."""

    port: int
    pid: int
    client: Redis

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@asynccontextmanager
async def bus() -> AsyncIterator[Bus]:
    port = closed_port()
    options = ["--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no"]
    with server("redis-server", *options) as child:
        await listening(port)
        async with Redis(port=port) as client:
            yield Bus(port, child.pid, client)


class Route:
    """An emitter at one hub and whoever subscribes at another, each a process of its own."""

    def __init__(self, bus: Bus, loop: str, stack: ExitStack, hubs: int = 2) -> None:
        self._run: Callable[..., Popen[str]] = lambda command: stack.enter_context(process(command))
        self._loop = loop
        settings = {"redis": bus.url, "replay_events": 200_000}
        near = answer(self._run(role("safe_hub", loop, json.dumps(settings))))
        self.far = self._run(role("safe_hub", loop, json.dumps({**settings, "hubs": hubs - 1}))) if hubs > 1 else None
        self._near, self._far = near, answer(self.far) if self.far else near
        self.publisher = self._run(role("publisher", "safe_broadcaster", near["publish"], loop))
        answer(self.publisher)

    def subscriber(self) -> Popen[str]:
        """A subscriber that measures ages."""
        return self.ready(role("subscriber", self._far["subscribe"], self._loop))

    def counter(self) -> Popen[str]:
        """A subscriber that counts, and costs next to nothing."""
        port = self._far["subscribe"].split(":")[2].split("/")[0]
        return self.ready([tool("fan"), "--port", port, "--subscribers", "1", "--publish", "", "--hello", SUBSCRIBE])

    def ready(self, command: list[str]) -> Popen[str]:
        child = self._run(command)
        answer(child)
        return child

    def stats(self) -> dict:
        """What the emitter's hub says of itself."""
        address = self._near["publish"].replace("ws:", "http:").removesuffix("/ws")
        with urllib.request.urlopen(f"{address}/stats") as said:
            return json.load(said)

    def flood(self, counter: Popen[str], events: int) -> float:
        """Events per second, from before the first is emitted until the last has reached the subscriber."""
        tell(counter, mode="receive", events=events)
        began = time.perf_counter()
        ask(self.publisher, rate=0, events=events)
        received(counter)
        return events / (time.perf_counter() - began)


def received(counter: Popen[str]) -> dict:
    said = answer(counter)
    if said["lost"]:
        raise RuntimeError(f"{said['lost']} events did not arrive")
    return said


async def rate(bus: Bus, figures: Figures, args: object) -> None:
    events = pool()
    with ExitStack() as stack:
        path = Route(bus, args.loop, stack)
        counter = path.counter()
        path.flood(counter, 1000)
        for _ in range(args.rounds):
            before = cpu_seconds(bus.pid)
            figures.add("ours, 2 hubs", "events/s", path.flood(counter, args.events))
            figures.add("ours, 2 hubs", "CPU s per million", (cpu_seconds(bus.pid) - before) / args.events * 1e6)
            count, before, began = args.events // 10, cpu_seconds(bus.pid), time.perf_counter()
            for number in range(count):
                body = orjson.dumps(events[number % len(events)])
                await bus.client.xadd("plain", {"e": body}, maxlen=10_000, approximate=True)
            figures.add("redis-py, XADD", "events/s", count / (time.perf_counter() - began))
            figures.add("redis-py, XADD", "CPU s per million", (cpu_seconds(bus.pid) - before) / count * 1e6)
        stream = "{sb1:bench}:stream"
        last, fields = (await bus.client.xinfo_stream(stream))["first-entry"]  # an entry's id is that of its last event
        kept = path.stats()["offset"] - int(last.split(b"-")[0]) + int(fields[b"n"])
        figures.add("ours, 2 hubs", "bytes of Redis per event", await bus.client.memory_usage(stream, samples=0) / kept)
    figures.check("bridge_rate", figures.ratios("ours, 2 hubs", "redis-py, XADD", "events/s"))


def latency(bus: Bus, figures: Figures, args: object) -> None:
    with ExitStack() as stack:
        path = Route(bus, args.loop, stack)
        paths = {
            "ours, 2 hubs": (path.publisher, path.subscriber()),
            "redis-py, PUBLISH": (
                path.ready(role("publisher", "redis", bus.url, args.loop)),
                path.ready(role("subscriber", bus.url, args.loop)),
            ),
        }
        for number in range(args.rounds + 1):
            for name, (publisher, subscriber) in paths.items():
                count = int(1000 * (args.seconds if number else 0.5))  # the first one warms up
                tell(subscriber, events=count)
                ask(publisher, rate=1000, events=count)
                for metric, value in answer(subscriber).items():
                    if number:
                        figures.add(name, metric, value)
    figures.check("bridge_p99", figures.ratios("ours, 2 hubs", "redis-py, PUBLISH", "p99 ms"))


async def gap(bus: Bus, figures: Figures, args: object) -> None:
    with ExitStack() as stack:
        path = Route(bus, args.loop, stack)
        counter = path.counter()
        path.flood(counter, 1000)
        for _ in range(args.rounds):
            before = path.stats()["offset"]
            tell(counter, mode="receive", events=args.gap)
            os.kill(path.far.pid, signal.SIGSTOP)
            await bus.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            ask(path.publisher, rate=1000, events=args.gap)
            while path.stats()["offset"] < before + args.gap:  # noqa: ASYNC110 it is another process
                await asyncio.sleep(0.01)
            os.kill(path.far.pid, signal.SIGCONT)
            figures.add("ours", "events/s", received(counter)["frames per second"])
            floor = [tool("redis_floor"), "--port", bus.port, "--event", orjson.dumps(event(0)).decode()]
            with process([*map(str, floor), "--entries", str(args.gap)]) as child:
                figures.add("XRANGE, pipelined", "events/s", answer(child)["entries per second"])
    figures.check("bridge_fill", figures.ratios("ours", "XRANGE, pipelined", "events/s"))


def hubs(bus: Bus, args: object) -> None:
    figures = Figures("bridge", loop=args.loop, layout=args.layout, part="hubs")
    for count in HUBS:
        with ExitStack() as stack:
            path = Route(bus, args.loop, stack, count)
            counter = path.counter()
            path.flood(counter, 1000)
            for _ in range(args.rounds):
                for name, pace in (("1000/s", 1000), ("as fast as it goes", 0)):
                    events = int(1000 * args.seconds) if pace else args.events
                    batches, before, began = (
                        path.stats()["bridge"]["batches"],
                        cpu_seconds(bus.pid),
                        time.perf_counter(),
                    )
                    tell(counter, mode="receive", events=events)
                    ask(path.publisher, rate=pace, events=events)
                    received(counter)
                    case = f"{count} hub{'s' if count > 1 else ''}, {name}"
                    figures.add(case, "events/s", events / (time.perf_counter() - began))
                    figures.add(case, "CPU s per million", (cpu_seconds(bus.pid) - before) / events * 1e6)
                    figures.add(case, "events per batch", events / (path.stats()["bridge"]["batches"] - batches))
    figures.print()


async def main(args: object) -> None:
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(bus())
        for name, part in (("rate", rate), ("latency", latency), ("gap", gap)):
            figures = Figures("bridge", loop=args.loop, layout=args.layout, part=name)
            said = part(redis, figures, args)
            if said is not None:
                await said
            figures.print()
            await redis.client.flushall()
        if args.loop == "asyncio":  # what Redis pays does not hang on the loop
            hubs(redis, args)


if __name__ == "__main__":
    arguments = options(
        __doc__,
        rounds=5,
        events=(100_000, 5000, "events of a flood"),
        seconds=(3, 1, "seconds at a rate"),
        gap=(10_000, 1000, "events in a gap"),
    )
    run(main(arguments), arguments.loop)
