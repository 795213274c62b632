"""Counts what arrived, from the events' own contents, and says whether the promises were kept.

Every event of the demo carries its engine's name (``citizen_id``) and that engine's own consecutive number (``n``, from
1). Nothing of the library's numbering is used here: a mistake there would show here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["EngineReport", "Tally", "Verdict", "judge"]


@dataclass
class _Track:
    """What is known of one engine's numbers."""

    highest: int = 0
    delivered: int = 0
    duplicates: int = 0
    out_of_order: int = 0
    missing: set[int] = field(default_factory=set[int])

    def see(self, n: int) -> None:
        if n > self.highest:
            self.missing.update(range(self.highest + 1, n))
            self.highest = n
        elif n in self.missing:
            self.missing.remove(n)
            self.out_of_order += 1
        else:
            self.duplicates += 1
            return
        self.delivered += 1


class Tally:
    """Counts deliveries. Every event goes through :meth:`see` in the order of its arrival."""

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}
        self.strangers = 0
        """Events without a number: of somebody else who uses the same hub. Not judged."""

    def see(self, event: Mapping[str, Any]) -> None:
        """Counts one event by ``content.citizen_id`` and ``content.n``."""
        content: Any = event.get("content")
        match content:
            case {"citizen_id": str(citizen), "n": int(n)} if n > 0:
                self._tracks.setdefault(citizen, _Track()).see(n)
            case _:
                self.strangers += 1

    @property
    def delivered(self) -> int:
        """Different events that arrived."""
        return sum(track.delivered for track in self._tracks.values())

    @property
    def duplicates(self) -> int:
        """Arrivals of an event that had arrived before."""
        return sum(track.duplicates for track in self._tracks.values())

    @property
    def out_of_order(self) -> int:
        """Events that arrived after a later one of the same engine."""
        return sum(track.out_of_order for track in self._tracks.values())

    @property
    def missing(self) -> int:
        """Events that have not arrived although a later one of the same engine has."""
        return sum(len(track.missing) for track in self._tracks.values())

    def lost(self, emitted: Mapping[str, int]) -> int:
        """Events that have not arrived, given how many each engine emitted."""
        return sum(self._lost_of(citizen, last) for citizen, last in emitted.items())

    def unannounced(self, emitted: Mapping[str, int]) -> int:
        """Events with numbers that no engine says it has emitted."""
        return sum(max(0, track.highest - emitted.get(citizen, 0)) for citizen, track in self._tracks.items())

    def _lost_of(self, citizen: str, last: int) -> int:
        track = self._tracks.get(citizen, _Track())
        return len(track.missing) + max(0, last - track.highest)


@dataclass(frozen=True)
class EngineReport:
    """What an engine says of itself at its end."""

    citizen: str
    emitted: int
    deepest_spill: int
    longest_flush: float
    """Seconds from the return of the link until the spill was empty."""
    drained: bool
    nodes: int
    edges: int
    skipped: int
    """Files that could not be parsed."""
    generation: int


@dataclass(frozen=True)
class Verdict:
    """The table at the end of the demo."""

    emitted: int
    delivered: int
    lost: int
    duplicated: int
    out_of_order: int
    deepest_spill: int
    longest_flush: float
    hub_kills: int
    problems: tuple[str, ...]
    """Why the run proves nothing, in words; empty for a valid run."""

    @property
    def ok(self) -> bool:
        """Whether every promise was kept, and something was promised at all."""
        broken = self.lost or self.duplicated or self.out_of_order or self.problems
        return not broken and self.delivered > 0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"ok": self.ok, **asdict(self)}


def judge(tally: Tally, engines: Mapping[str, EngineReport | None], *, hub_kills: int) -> Verdict:
    """Compares what arrived with what the engines say they emitted; None stands for an engine without a report."""
    reports = [report for report in engines.values() if report is not None]
    emitted = {report.citizen: report.emitted for report in reports}
    problems = [f"{citizen} ended without a report" for citizen, report in engines.items() if report is None]
    problems += [f"{report.citizen} emitted nothing" for report in reports if not report.emitted]
    if unannounced := tally.unannounced(emitted):
        problems.append(f"{unannounced} events arrived that no engine has reported")
    return Verdict(
        emitted=sum(emitted.values()),
        delivered=tally.delivered,
        lost=tally.lost(emitted),
        duplicated=tally.duplicates,
        out_of_order=tally.out_of_order,
        deepest_spill=max((report.deepest_spill for report in reports), default=0),
        longest_flush=max((report.longest_flush for report in reports), default=0.0),
        hub_kills=hub_kills,
        problems=tuple(problems),
    )
