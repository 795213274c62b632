"""The keepers: one sees an engine through all its lives and deaths, one the hub."""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chaos.engine import LANES
from chaos.oracle import Life, Verdict
from chaos.processes import EngineProcess, HubProcess
from chaos.schedule import PAUSES, draw_death, draw_hub_life, draw_orders, last_orders

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from chaos.engine import Orders
    from chaos.levels import Level
    from chaos.schedule import EngineDeath

__all__ = ["EngineKeeper", "HubKeeper", "Outcome", "World", "within"]

DRAIN_TIMEOUT = 60.0
"""Seconds in which everything must be delivered when the faults are over."""

_HUB_PATIENCE = 5.0
"""Seconds that a kill waits for the hub's next return, at most."""

_LIVES = 1_000_000
"""Lanes set apart for each engine, whose numbers then do not depend on what the others do."""


@dataclass
class Outcome:
    """What happened, and what was found."""

    engine_kills: int = 0
    engine_stops: int = 0
    hub_kills: int = 0
    hub_stops: int = 0
    cuts: int = 0
    verdict: Verdict = field(default_factory=Verdict)

    def violate(self, text: str) -> None:
        """Note that something is wrong."""
        self.verdict.violations.append(text)


@dataclass
class World:
    """What the keepers of a run share."""

    folder: Path
    level: Level
    seed: str
    url: str
    """Where engines connect."""
    outcome: Outcome
    progress: Callable[[Outcome], None]
    pauses: Sequence[float] = PAUSES
    """Seconds between two events of a lane, one of these for each life."""
    hub_back: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced, at each return of the hub."""


class HubKeeper:
    """Kills the hub and starts it again until there were enough faults."""

    def __init__(self, world: World, hub: HubProcess) -> None:
        self._world = world
        self._hub = hub
        self._rng = random.Random(f"{world.seed}/{hub.name}")

    async def keep(self, over: asyncio.Event) -> None:
        """Go on until ``over``; then the hub answers."""
        outcome, loop = self._world.outcome, asyncio.get_running_loop()
        started = loop.time()
        while not over.is_set():
            plan = draw_hub_life(self._rng)
            if plan.life > 0.4:  # shorter ones end while it starts
                await self._hub.answers()
                self._announce()
            if await within(over.wait(), max(0.0, started + plan.life - loop.time())):
                break
            if not self._hub.signal(signal.SIGKILL if plan.kill else signal.SIGTERM):
                outcome.violate(f"{self._hub.name} ended by itself: {self._hub.complaint()}")
            outcome.hub_kills += plan.kill
            outcome.hub_stops += not plan.kill
            await self._hub.end()
            await within(over.wait(), plan.absence)
            await self._hub.start()
            started = loop.time()
        await self._hub.answers()
        self._announce()

    def _announce(self) -> None:
        self._world.hub_back.set()
        self._world.hub_back = asyncio.Event()


class EngineKeeper:
    """Sees an engine through all its lives, on one spill."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._number = number
        self.name = f"engine-{number}"
        self._rng = random.Random(f"{world.seed}/{self.name}")
        self._spill = str(world.folder / f"{self.name}.db")
        self._lanes = iter(range(number * _LIVES * LANES, (number + 1) * _LIVES * LANES, LANES))
        self._spare: EngineProcess | None = None
        self._born = 0
        self.lives: list[Life] = []

    def owns(self, lane: int) -> bool:
        """Whether a lane is this engine's."""
        return lane // (_LIVES * LANES) == self._number

    async def live(self, kills: int, over: asyncio.Event | None = None) -> None:
        """Live and be killed so many times, or until it is over."""
        outcome = self._world.outcome
        while kills and not (over and over.is_set()):
            orders = draw_orders(
                self._rng, url=self._world.url, spill_path=self._spill, name=self.name, level=self._world.level,
                lane=next(self._lanes), pauses=self._world.pauses,
            )  # fmt: skip
            stats = await self._one_life(orders, draw_death(self._rng, orders))
            if stats is None:
                kills -= 1
                outcome.engine_kills += 1
            else:
                outcome.engine_stops += 1
            self._world.progress(outcome)

    async def finish(self) -> None:
        """The last life: everything is confirmed, and the spill is empty."""
        outcome = self._world.outcome
        orders = last_orders(
            url=self._world.url, spill_path=self._spill, name=self.name, level=self._world.level,
            lane=next(self._lanes),
        )  # fmt: skip
        stats = await self._one_life(orders, None)
        await self.discard()
        if stats is None:
            outcome.violate(f"{self.name} did not drain within {DRAIN_TIMEOUT:.0f} s")
            return
        for name in ("current_spill_depth", "in_flight", "outbox_bytes", "spill_bytes", "dropped"):
            if stats[name]:
                outcome.violate(f"{self.name}: everything is confirmed, but {name} is {stats[name]}")
        if stats["acked_seq"] != stats["last_seq"]:
            outcome.violate(f"{self.name}: acked_seq {stats['acked_seq']} is not last_seq {stats['last_seq']}")

    async def discard(self) -> None:
        """End the spare process."""
        if self._spare is not None:
            await self._spare.discard()
            self._spare = None

    async def _one_life(self, orders: Orders, death: EngineDeath | None) -> dict[str, Any] | None:
        """Give the orders to a process and kill it; its last numbers if it came to stop in order."""
        life = Life(orders)
        self.lives.append(life)
        engine = self._spare or await self._bear()
        self._spare = await self._bear()  # it imports while this one lives
        returned = asyncio.Event()

        def on_returned(n: int) -> None:
            life.returned.add(n)
            if death is not None and len(life.returned) >= death.count:
                returned.set()

        engine.order(orders, on_returned)
        if death is None:
            await within(engine.process.wait(), DRAIN_TIMEOUT)
        else:
            await self._wait_for(death, engine, returned)
        killed = engine.signal(signal.SIGKILL)
        await engine.heard()  # to the end: what was told before the kill counts
        life.opened = engine.opened
        if engine.stats is not None:
            life.end = "stopped"  # all that it had to do was done, even if it was killed on its way out
        if (engine.process.returncode and not killed) or (not killed and engine.stats is None):
            self._world.outcome.violate(f"{self.name} ended by itself in life {len(self.lives) - 1}")
        if complaint := engine.complaint():
            self._world.outcome.violate(f"{self.name} complains in life {len(self.lives) - 1}: {complaint[-2000:]}")
        return engine.stats

    async def _wait_for(self, death: EngineDeath, engine: EngineProcess, returned: asyncio.Event) -> None:
        match death.moment:
            case "orders":
                pass
            case "returned":
                await _first(returned.wait(), engine.stopping.wait(), patience=_HUB_PATIENCE)
            case "hub":
                await _first(self._world.hub_back.wait(), patience=_HUB_PATIENCE)
            case "stopping":
                await engine.stopping.wait()
                await within(engine.process.wait(), death.after)
                return
        if death.after:
            await asyncio.sleep(death.after)

    async def _bear(self) -> EngineProcess:
        self._born += 1
        engine = EngineProcess(self.name, self._world.folder / f"{self.name}.{self._born}.err")
        await engine.start()
        return engine


async def within(waiting: Any, seconds: float) -> bool:
    """Whether it came to pass in time."""
    try:
        await asyncio.wait_for(waiting, seconds)
    except asyncio.TimeoutError:
        return False
    return True


async def _first(*waiting: Any, patience: float) -> None:
    """Wait for any of them, but not for ever."""
    tasks = [asyncio.ensure_future(each) for each in waiting]
    await asyncio.wait(tasks, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
