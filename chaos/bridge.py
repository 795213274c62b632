"""``python -m chaos.bridge``: hubs that share a stream over Redis, while everything that can die does.

Three engines, each time at another hub · three hubs · one Redis · subscribers that come back at any hub. Killed or
silenced at random are the engines, the hubs, Redis, its connections, and those between engines and hubs. When the
faults are over, everything has to drain; then each subscriber is judged for itself, as in `chaos.run`, and one thing
more: whoever sat at a hub that lost Redis was told so, and told when it was over.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chaos.lives import DRAIN_TIMEOUT, EngineKeeper, HubKeeper, Outcome, World, within
from chaos.processes import HOST, Broken, HubProcess, RedisProcess, free_port
from chaos.proxy import Proxy
from chaos.run import all_of, cancel, catch_up, judge_stream
from chaos.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chaos.witness import Sitting

__all__ = ["run"]

HUBS = 3
ENGINES = 3
WITNESSES = 30

_PAUSES = (0.01, 0.02, 0.05)
"""Seconds between two events of a lane: thirty witnesses in one program have to keep up."""

_PROBE = 0.5
"""Seconds between the probes of a hub."""

_RESTART = 0.2
"""Seconds until a hub that found no Redis is started again."""

_TOLD_WITHIN = 3.0
"""Seconds after which whoever listens must know that Redis is lost: a probe, its patience, and a busy machine."""

Fault = Literal["kill", "freeze", "fill up", "cut the listeners", "cut everybody", "forget the scripts"]


@dataclass(frozen=True)
class Outage:
    """Redis did not answer, or took nothing, from here to there, in the loop's time."""

    begin: float
    end: float


class SupervisedHub(HubProcess):
    """Ends if Redis is away when it starts, as it should, and is then started again."""

    async def answers(self) -> None:
        """Wait until its port answers."""
        while True:
            try:
                return await super().answers()
            except Broken:
                if self.running or not self._was_refused():
                    raise
            await asyncio.sleep(_RESTART)
            await self.start()

    def signal(self, number: int) -> bool:
        """Signal it; False if it has ended by itself before, and not for want of Redis."""
        return super().signal(number) or self._was_refused()

    def _was_refused(self) -> bool:
        return "cannot use the Redis" in self.complaint()


class RedisKeeper:
    """Breaks Redis, in every way there is, and mends it."""

    def __init__(self, seed: str, redis: RedisProcess, outcome: Outcome) -> None:
        self._rng = random.Random(f"{seed}/redis")
        self._redis = redis
        self._outcome = outcome
        self.outages: list[Outage] = []
        self.faults: dict[Fault, int] = {}

    async def keep(self, over: asyncio.Event) -> None:
        """Go on until ``over``; then Redis answers."""
        weights: dict[Fault, int] = {
            "kill": 30,
            "freeze": 20,
            "fill up": 10,
            "cut the listeners": 20,
            "cut everybody": 10,
            "forget the scripts": 10,
        }
        while not await within(over.wait(), self._rng.uniform(0.5, 4.0)):
            fault = self._rng.choices(list(weights), list(weights.values()))[0]
            self.faults[fault] = self.faults.get(fault, 0) + 1
            absence = self._rng.choice((0.0, self._rng.uniform(0.1, 1.0), self._rng.uniform(4.0, 6.0)))
            match fault:
                case "kill":
                    await self._kill(absence, over)
                case "freeze":
                    await self._freeze(absence, over)
                case "fill up":
                    await self._fill_up(absence, over)
                case "cut the listeners":
                    await self._redis.say("CLIENT KILL TYPE pubsub")
                case "cut everybody":
                    await self._redis.say("CLIENT KILL TYPE normal SKIPME yes")
                    await self._redis.say("CLIENT KILL TYPE pubsub")
                case "forget the scripts":
                    await self._redis.say("SCRIPT FLUSH")

    async def _kill(self, absence: float, over: asyncio.Event) -> None:
        begin = asyncio.get_running_loop().time()
        if not self._redis.signal(signal.SIGKILL):
            self._outcome.violate(f"Redis ended by itself: {self._redis.complaint()}")
        await self._redis.end()
        await within(over.wait(), absence)
        end = asyncio.get_running_loop().time()
        await self._redis.start()
        await self._redis.answers()
        self.outages.append(Outage(begin, end))

    async def _fill_up(self, seconds: float, over: asyncio.Event) -> None:
        begin = asyncio.get_running_loop().time()
        await self._redis.say("CONFIG SET maxmemory 1mb")
        await within(over.wait(), seconds)
        await self._redis.say("CONFIG SET maxmemory 0")
        self.outages.append(Outage(begin, asyncio.get_running_loop().time()))

    async def _freeze(self, seconds: float, over: asyncio.Event) -> None:
        begin = asyncio.get_running_loop().time()
        self._redis.signal(signal.SIGSTOP)
        await within(over.wait(), seconds)
        self._redis.signal(signal.SIGCONT)
        self.outages.append(Outage(begin, asyncio.get_running_loop().time()))


def untold(outages: Iterable[Outage], sittings: Iterable[Sitting]) -> list[str]:
    """Who sat at a hub through enough of an outage and was not told; who was told, and not when it was over."""
    violations: list[str] = []
    for sitting in sittings:
        for outage in outages:
            known = outage.begin + _TOLD_WITHIN
            if sitting.begin > outage.begin or min(outage.end, sitting.end) < known:
                continue
            # Who was told of an earlier one, and not yet that it was over, knows.
            if [status for at, status in sitting.notices if at <= known][-1:] != ["degraded"]:
                heard = [(round(at - outage.begin, 2), status) for at, status in sitting.notices]
                violations.append(f"{sitting.url}: not told of an outage within {_TOLD_WITHIN} s; heard {heard}")
        if sitting.end == float("inf") and sitting.notices and sitting.notices[-1][1] == "degraded":
            violations.append(f"{sitting.url}: was never told that it was over")
    return violations


async def run(folder: Path, seed: int, seconds: float, *, durable: bool = True) -> tuple[Outcome, RedisKeeper]:
    """Break things for so long, and judge.

    Args:
        folder: An empty directory for spills and Redis.
        seed: Draws the schedule.
        seconds: How long there are faults.
        durable: False: Redis forgets when it is killed, which must be found.

    """
    outcome, name = Outcome(), f"{seed}/bridge"
    redis = RedisProcess(folder, free_port(), durable=durable)
    options = ("--redis", f"redis://{HOST}:{redis.port}/0", "--channel", "chaos", "--probe-interval", str(_PROBE))
    hubs = [SupervisedHub(f"hub-{number}", folder, free_port(), *options) for number in range(HUBS)]
    rng = random.Random(f"{name}/witnesses")
    watching = [Witness(lambda: f"ws://{HOST}:{rng.choice(hubs).port}/ws") for _ in range(WITNESSES)]
    tasks: list[asyncio.Task[None]] = []
    over = asyncio.Event()
    breaker = RedisKeeper(name, redis, outcome)
    try:
        await redis.start()
        await redis.answers()
        for hub in hubs:
            await hub.start()
        for hub in hubs:
            await hub.answers()
        looking = [asyncio.create_task(each.run()) for each in watching]
        tasks += looking
        for each in watching:
            await asyncio.wait_for(each.listens.wait(), DRAIN_TIMEOUT)
        async with Proxy(HOST, [hub.port for hub in hubs], random.Random(f"{name}/proxy")) as proxy:
            url = f"ws://{HOST}:{proxy.port}/ws"
            world = World(folder, "process", name, url, outcome, lambda _outcome: None, pauses=_PAUSES)
            keepers = [EngineKeeper(world, number) for number in range(ENGINES)]
            faults = [asyncio.create_task(HubKeeper(world, hub).keep(over)) for hub in hubs]
            faults.append(asyncio.create_task(breaker.keep(over)))
            living = [asyncio.create_task(each.live(sys.maxsize, over)) for each in keepers]
            tasks += faults + living
            clock = asyncio.create_task(asyncio.sleep(seconds))
            tasks.append(clock)
            await all_of(clock, others=(*faults, *looking, *living))
            proxy.calm = True
            over.set()
            await all_of(*faults, *living, others=tuple(looking))
            for each in keepers:
                await each.finish()
            outcome.cuts = proxy.cuts
            await hubs[0].answers()  # it may have been started a moment ago
            for each in watching:
                await catch_up(hubs[0], each, outcome)
    finally:
        await cancel(tasks)
        for process in (*hubs, redis):
            await process.discard()
    for each in watching:
        judge_stream(each, keepers, outcome)
        outcome.verdict.violations += untold(breaker.outages, each.sittings)
    return outcome, breaker


def main() -> int:
    """Parse the command line, run, tell."""
    parser = argparse.ArgumentParser(prog="chaos.bridge", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long there are faults (default: 20)")
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat its schedule (default: a new one)")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    outcome, breaker = asyncio.run(run(folder, seed, arguments.seconds))
    for text, number in _figures(outcome, breaker).items():
        print(f"{text:>46}  {number:,}")
    for text in outcome.verdict.violations[:_SHOWN]:
        print(f"VIOLATION: {text}")
    if count := len(outcome.verdict.violations):
        print(f"{count} violations; --seed {seed} repeats the schedule; the files are in {folder}")
        return 1
    shutil.rmtree(folder)
    print("no violation")
    return 0


_SHOWN = 40
"""Violations printed."""


def _figures(outcome: Outcome, breaker: RedisKeeper) -> dict[str, int]:
    verdict = outcome.verdict
    return {
        "engines killed": outcome.engine_kills,
        "engines stopped in order": outcome.engine_stops,
        "hubs killed": outcome.hub_kills,
        "hubs stopped in order": outcome.hub_stops,
        "connections of engines cut, silenced, slowed": outcome.cuts,
        **{f"Redis: {fault}": count for fault, count in sorted(breaker.faults.items())},
        "outages long enough to be told": sum(each.end - each.begin >= _TOLD_WITHIN for each in breaker.outages),
        "emits that had returned": verdict.returned // WITNESSES,
        "events delivered to all subscribers together": verdict.delivered,
        "violations": len(verdict.violations),
    }


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
