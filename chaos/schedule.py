"""What happens when, drawn from the seed: the same seed gives the same lives, kills, absences and cuts.

The moments are the same; what a process has reached by then is the machine's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from chaos.engine import Orders

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from chaos.engine import Style
    from chaos.levels import Level

__all__ = ["PAUSES", "EngineDeath", "HubLife", "draw_death", "draw_hub_life", "draw_orders", "last_orders"]

PAUSES = (0.0, 0.0, 0.0005, 0.003)
"""Seconds between two events of a lane: without a pause, and with one."""

_SETTINGS: dict[str, Any] = {
    "backoff_initial": 0.02,
    "backoff_max": 0.2,
    "ack_timeout": 1.0,
    "ping_interval": 0.5,
    "connect_timeout": 1.0,
    "breaker_cooldown": 0.2,
    "report_interval": 0.05,
}
"""An outage lasts a second here, not an hour."""


@dataclass(frozen=True)
class EngineDeath:
    """When an engine is killed: ``after`` seconds past a moment."""

    moment: Literal["orders", "returned", "stopping", "hub"]
    """Past its orders; past the return of the emit number ``count``; past the beginning of its stop; past the next
    return of the hub, when the spill is flushed."""
    after: float
    count: int = 0


@dataclass(frozen=True)
class HubLife:
    """A life of the hub and its absence afterwards, in seconds."""

    life: float
    """From its start, not from the moment when it answers: it is killed while it starts, too."""
    absence: float
    kill: bool
    """SIGKILL; else it is asked to stop."""


def draw_orders(
    rng: random.Random, *, url: str, spill_path: str, name: str, level: Level, lane: int, pauses: Sequence[float]
) -> Orders:
    """Orders for a life that will be killed, or that stops in order."""
    style: Style = rng.choices(("one", "tasks", "threads"), (5, 3, 2))[0]
    stops = rng.random() < 0.25
    return Orders(
        url=url,
        spill_path=spill_path,
        name=name,
        level=level,
        lane=lane,
        style=style,
        early=rng.choice((0, 0, 1, 20)),
        limit=int(10 ** rng.uniform(1.5, 3.3)),
        pause=rng.choice(pauses),
        stop_after=10 ** rng.uniform(-3, -0.2) if stops else None,
        finish=False,
        settings=_SETTINGS
        | {
            "outbox_bytes": rng.choice((1 << 20, 16 << 20)),
            "when_full": rng.choice(("drop_oldest", "wait")),
            "breaker_threshold": rng.choice((3, 1000)),
        },
    )


def last_orders(*, url: str, spill_path: str, name: str, level: Level, lane: int) -> Orders:
    """Orders for the life that nobody kills: it sees everything confirmed."""
    return Orders(
        url=url,
        spill_path=spill_path,
        name=name,
        level=level,
        lane=lane,
        style="one",
        early=0,
        limit=10,
        pause=0.0,
        stop_after=None,
        finish=True,
        settings=_SETTINGS | {"breaker_threshold": 1000},
    )


def draw_death(rng: random.Random, orders: Orders) -> EngineDeath:
    """When the engine with these orders is killed."""
    if orders.stop_after is not None:
        return EngineDeath("stopping", rng.choice((0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3), 5.0)))
    deaths = (
        EngineDeath("orders", rng.choice((0.0, 10 ** rng.uniform(-6, -2)))),
        EngineDeath("orders", rng.uniform(0.005, 0.15)),
        EngineDeath("orders", rng.uniform(0.05, 0.6)),
        EngineDeath("orders", rng.uniform(0.6, 2.5)),
        EngineDeath("returned", rng.choice((0.0, rng.uniform(0, 0.01))), rng.randrange(1, orders.limit)),
        EngineDeath("hub", rng.uniform(0, 0.3)),
    )
    return rng.choices(deaths, (12, 15, 30, 8, 20, 15))[0]


def draw_hub_life(rng: random.Random) -> HubLife:
    """How long the hub lives, and is absent afterwards."""
    life = rng.choices((rng.uniform(0, 0.4), rng.uniform(0.4, 2.0), rng.uniform(2.0, 4.0)), (15, 55, 30))[0]
    absence = rng.choices((0.0, rng.uniform(0.05, 0.5), rng.uniform(0.5, 2.0)), (50, 35, 15))[0]
    return HubLife(life, absence, kill=rng.random() < 0.85)
