"""Events whose content follows from their number, so that whoever gets one can tell whether it was ever emitted."""

from __future__ import annotations

from typing import Any

__all__ = ["SPAN", "event", "lane_of", "number_in"]

SPAN = 1_000_000
"""Numbers of a lane. A lane is one thread of one life of an engine: it emits its numbers in order, without holes."""

_MIX = 0x9E3779B97F4A7C15
_UNITS = ("0123456789abcdef", 'é"\\\n\u2028😀', "\x00\x1f/</script>", " ")


def lane_of(n: int) -> int:
    """The lane that a number belongs to."""
    return n // SPAN


def event(n: int) -> dict[str, Any]:
    """The event with this number. Most are tiny, a few have 16 KiB, very few 100 KiB."""
    return {"type": "chaos.n", "topic": f"chaos/{lane_of(n)}", "n": n, "pad": _pad(n)}


def number_in(data: object) -> int | None:
    """The number of an event that is exactly as it was emitted; None for anything else."""
    match data:
        case {"n": int(n)} if n >= 0 and data == event(n):
            return n
        case _:
            return None


def _pad(n: int) -> str:
    mixed = (n + 1) * _MIX & 0xFFFF_FFFF_FFFF_FFFF
    mixed ^= mixed >> 29
    size = mixed % 1000
    if size < 3:
        length = 100 << 10
    elif size < 40:
        length = 1024 + mixed // 1000 % (15 << 10)
    else:
        length = mixed // 1000 % 200
    unit = f"{mixed:016x}{_UNITS[mixed >> 40 & 3]}"
    return (unit * (length // len(unit) + 1))[:length]
