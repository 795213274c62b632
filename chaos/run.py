"""One run: engines and a hub live and die by the schedule; when the faults are over, everything must drain."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING

from chaos.events import lane_of
from chaos.lives import DRAIN_TIMEOUT, EngineKeeper, HubKeeper, Outcome, World
from chaos.oracle import Gap, Stranger, judge
from chaos.processes import HOST, HubProcess, free_port
from chaos.proxy import Proxy
from chaos.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from chaos.levels import Level
    from chaos.oracle import Entry

__all__ = ["all_of", "cancel", "catch_up", "judge_stream", "run"]

ENGINES = 2
"""At once, on one hub: it has to keep their marks apart."""

_POLL = 0.02


async def run(
    folder: Path, level: Level, seed: int, kills: int, *, durable_hub: bool = True,
    progress: Callable[[Outcome], None] = lambda _outcome: None,
) -> Outcome:  # fmt: skip
    """Kill engines so many times at this level, and judge.

    Args:
        folder: An empty directory for spills and log.
        level: The durability of all events.
        seed: Draws the schedule.
        kills: SIGKILLs of engines; the hub is killed as often as there is time for.
        durable_hub: False: the hub forgets when it is killed, which must be found.
        progress: Told after each life.

    """
    port, outcome = free_port(), Outcome()
    hub = HubProcess("hub", folder, port, *(("--log", str(folder / "hub.db")) if durable_hub else ()))
    await hub.start()
    await hub.answers()
    witness = Witness(lambda: f"ws://{HOST}:{port}/ws")
    tasks = [asyncio.create_task(witness.run())]
    over = asyncio.Event()
    try:
        await asyncio.wait_for(witness.listens.wait(), DRAIN_TIMEOUT)
        async with Proxy(HOST, [port], random.Random(f"{seed}/{level}/proxy")) as proxy:
            world = World(folder, level, f"{seed}/{level}", f"ws://{HOST}:{proxy.port}/ws", outcome, progress)
            keepers = [EngineKeeper(world, number) for number in range(ENGINES)]
            tasks.append(keeping := asyncio.create_task(HubKeeper(world, hub).keep(over)))
            shares = [kills // ENGINES + (number < kills % ENGINES) for number in range(ENGINES)]
            living = [asyncio.create_task(each.live(share)) for each, share in zip(keepers, shares, strict=True)]
            tasks += living
            await all_of(*living, others=(keeping, tasks[0]))
            proxy.calm = True
            over.set()
            await keeping
            for each in keepers:
                await each.finish()
            outcome.cuts = proxy.cuts
            await catch_up(hub, witness, outcome)
            if (known := (await hub.stats())["known_emitters"]) != ENGINES:
                outcome.violate(f"the hub knows {known} emitters; there are {ENGINES}")
    finally:
        await cancel(tasks)
        await hub.discard()
    judge_stream(witness, keepers, outcome)
    if any(sitting.notices for sitting in witness.sittings):
        outcome.violate("the hub said that it was not well")
    if complaint := hub.complaint():
        outcome.violate(f"the hub complains: {complaint[-2000:]}")
    return outcome


def judge_stream(witness: Witness, keepers: Sequence[EngineKeeper], outcome: Outcome) -> None:
    """Judge what one witness got of all engines."""
    outcome.verdict.violations += witness.violations
    for each in keepers:
        outcome.verdict += judge(each.lives, [entry for entry in witness.entries if _is_of(entry, each)])
    strangers = [entry for entry in witness.entries if _is_nobodys(entry, keepers)]
    outcome.verdict += judge([], strangers)


def _is_of(entry: Entry, keeper: EngineKeeper) -> bool:
    match entry:
        case Stranger():
            return False
        case Gap():
            return entry.emitter == keeper.name
        case n:
            return keeper.owns(lane_of(n))


def _is_nobodys(entry: Entry, keepers: Sequence[EngineKeeper]) -> bool:
    return not any(_is_of(entry, keeper) for keeper in keepers)


async def catch_up(hub: HubProcess, witness: Witness, outcome: Outcome) -> None:
    """Wait until the witness has all that the hub has."""
    stats = await hub.stats()
    deadline = asyncio.get_running_loop().time() + DRAIN_TIMEOUT
    while (witness.epoch, witness.offset) != (stats["epoch"], stats["offset"]):
        if asyncio.get_running_loop().time() > deadline:
            at = f"{witness.epoch}:{witness.offset}"
            outcome.violate(f"the subscriber is at {at}, the hub at {stats['epoch']}:{stats['offset']}")
            return
        await asyncio.sleep(_POLL)


async def all_of(*tasks: asyncio.Task[None], others: tuple[asyncio.Task[None], ...]) -> None:
    """Wait for all tasks; raise at once what any of them, or of the others, raises."""
    pending = set(tasks)
    while pending:
        done, _ = await asyncio.wait(pending | set(others), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        pending -= done


async def cancel(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel them and wait for their end."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):  # what failed first is on its way already
            await task
