"""Says what is wrong, from three things only: what was ordered, what callers were told, what a subscriber got.

Pure: knows no process and no clock. It is itself tested, by runs made up with one thing wrong each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from chaos.events import SPAN, lane_of
from chaos.levels import survives_kill

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from chaos.engine import Orders

__all__ = ["End", "Entry", "Gap", "Life", "Stranger", "Verdict", "judge"]

End: TypeAlias = Literal["killed", "stopped"]

_EXAMPLES = 5
"""Numbers shown of each violation."""


@dataclass
class Life:
    """One life of an engine, and what its callers were told."""

    orders: Orders
    end: End = "killed"
    opened: bool = True
    """Whether its spill was open; before that nothing of it can be on the disk, not even that it lived."""
    returned: set[int] = field(default_factory=set[int])

    def bounds(self) -> dict[int, int]:
        """For each lane the highest number that may have been emitted: few calls are under way at once."""
        orders = self.orders
        done = {lane: lane * SPAN - 1 for lane in orders.lanes}
        done[orders.lane] += orders.early
        for n in self.returned:
            done[lane_of(n)] = max(done[lane_of(n)], n)
        return {lane: min(n + orders.window, lane * SPAN + orders.limit - 1) for lane, n in done.items()}


@dataclass(frozen=True)
class Gap:
    """The hub told that these seqs of an emitter will never come."""

    emitter: str
    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class Stranger:
    """An event that nobody emitted like this."""

    excerpt: str


Entry: TypeAlias = "int | Gap | Stranger"
"""What the subscriber got, in its order; an event is its number."""


@dataclass
class Verdict:
    """What was found for one engine, or for several together."""

    returned: int = 0
    delivered: int = 0
    unreturned: int = 0
    """Delivered although the caller was never told, because the engine was killed in between."""
    covered: int = 0
    """Lost with a killed engine, as its level allows, and told by a gap."""
    untold: int = 0
    """Lost with an engine that was killed before its spill was open."""
    gaps: int = 0
    violations: list[str] = field(default_factory=list[str])

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.returned + other.returned,
            self.delivered + other.delivered,
            self.unreturned + other.unreturned,
            self.covered + other.covered,
            self.untold + other.untold,
            self.gaps + other.gaps,
            self.violations + other.violations,
        )


def judge(lives: Sequence[Life], entries: Iterable[Entry]) -> Verdict:
    """Judge one engine: its lives, oldest first, and all entries of the stream that are its own."""
    verdict = Verdict(returned=sum(len(life.returned) for life in lives))
    lanes = {lane: number for number, life in enumerate(lives) for lane in life.orders.lanes}
    bounds = {lane: highest for life in lives for lane, highest in life.bounds().items()}
    seen: list[set[int]] = [set() for _ in lives]
    told: dict[int, int] = defaultdict(int)
    newest: dict[int, int] = {}
    current = -1
    for entry in entries:
        match entry:
            case Stranger(excerpt):
                verdict.violations.append(f"never emitted: {excerpt}")
            case Gap(reason="crash") if lives and not survives_kill(lives[0].orders.level):
                told[current] += entry.last - entry.first + 1
                verdict.gaps += 1
            case Gap():
                verdict.violations.append(f"a gap that nothing explains: {entry}")
            case n:
                lane = lane_of(n)
                life = lanes.get(lane)
                if life is None or n > bounds[lane]:
                    verdict.violations.append(f"never emitted: {n}")
                    continue
                verdict.delivered += 1
                if n in seen[life]:
                    verdict.violations.append(f"twice: {n}")
                elif life < current or n < newest.get(lane, -1):
                    verdict.violations.append(f"out of order: {n} after {newest.get(lane, 'a later life')}")
                seen[life].add(n)
                newest[lane] = max(n, newest.get(lane, -1))
                current = max(life, current)
    _account(lives, seen, told, newest, verdict)
    return verdict


def _account(
    lives: Sequence[Life], seen: list[set[int]], told: dict[int, int], newest: dict[int, int], verdict: Verdict
) -> None:
    """Whatever is missing is explained, or a violation."""
    missing: dict[int, set[int]] = defaultdict(set)
    place = -1
    for number, life in enumerate(lives):
        verdict.unreturned += len(seen[number] - life.returned)
        if seen[number]:
            place = number
        lost = life.returned - seen[number]
        if not lost:
            continue
        if survives_kill(life.orders.level) or life.end == "stopped":
            verdict.violations.append(f"lost at {life.orders.level}, life {number} was {life.end}: {_some(lost)}")
        elif not life.opened:
            verdict.untold += len(lost)
        elif holes := {n for n in lost if n < newest.get(lane_of(n), -1)}:
            verdict.violations.append(f"lost before later ones that came, life {number}: {_some(holes)}")
        else:
            missing[place] |= lost  # the gap has to lie between the last that came and the first of a later life
    for place, lost in missing.items():
        if told[place] < len(lost):
            verdict.violations.append(f"lost and not told, {told[place]} in gaps there: {_some(lost)}")
        else:
            verdict.covered += len(lost)


def _some(numbers: set[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:_EXAMPLES]))
    return f"{len(numbers)} ({shown}{', …' if len(numbers) > _EXAMPLES else ''})"
