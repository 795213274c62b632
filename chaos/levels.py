"""The levels of durability, and what each owes to a caller whose engine was killed."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["AVAILABLE", "KNOWN", "Level"]

Level = Literal["memory", "process", "power", "delivered"]

KNOWN: tuple[Level, ...] = get_args(Level)

AVAILABLE: tuple[Level, ...] = ("memory", "process", "power", "delivered")
"""Those that the package has; each of them is tried."""


def survives_kill(level: Level) -> bool:
    """Whether an event for which the caller was told "accepted" must arrive although its engine was killed then.

    At ``memory`` it may be lost, and then a gap has to say so in its place.
    """
    return level != "memory"
