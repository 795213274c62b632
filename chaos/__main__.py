"""``python -m chaos``: kills until there is proof, or a violation. Exit code 0: nothing was violated."""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chaos.levels import AVAILABLE, KNOWN
from chaos.run import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.levels import Level
    from chaos.lives import Outcome

_SHOWN = 40
"""Violations printed of each level."""


def main() -> int:
    """Parse the command line, run, tell."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs of engines at each level (default: 100)")
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat its schedule (default: a new one)")
    parser.add_argument(
        "--durability", choices=(*KNOWN, "all"), default="all", help=f"level (default: all, {', '.join(AVAILABLE)})"
    )
    arguments = parser.parse_args()
    level = arguments.durability
    if level != "all" and level not in AVAILABLE:
        parser.error(f"this version has no level {level!r}; it has {', '.join(AVAILABLE)}")
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    levels: tuple[Level, ...] = AVAILABLE if level == "all" else (level,)
    print(f"seed {seed}", flush=True)
    outcomes: dict[Level, Outcome] = {each: _run(each, seed, arguments.kills) for each in levels}
    print(_table(outcomes))
    violations = 0
    for each, outcome in outcomes.items():
        violations += len(outcome.verdict.violations)
        for text in outcome.verdict.violations[:_SHOWN]:
            print(f"VIOLATION {each}: {text}")
        if (rest := len(outcome.verdict.violations) - _SHOWN) > 0:
            print(f"… and {rest} more at {each}")
    print(f"{violations} violations; --seed {seed} repeats the schedule" if violations else "no violation")
    return 1 if violations else 0


def _run(level: Level, seed: int, kills: int) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    started = time.monotonic()

    def progress(outcome: Outcome) -> None:
        if sys.stderr.isatty():
            took = time.monotonic() - started
            words = f"{level}: {outcome.engine_kills}/{kills} engines and {outcome.hub_kills} hubs killed, {took:.0f} s"
            print(f"\r{words}", end="", file=sys.stderr, flush=True)

    outcome = asyncio.run(run(folder, level, seed, kills, progress=progress))
    print(file=sys.stderr)
    if outcome.verdict.violations:
        print(f"spills, log and what the processes said: {folder}")
    else:
        shutil.rmtree(folder)
    return outcome


def _table(outcomes: dict[Level, Outcome]) -> str:
    def row(name: str, number: Callable[[Outcome], int]) -> list[str]:
        return [name, *(f"{number(outcome):,}" for outcome in outcomes.values())]

    rows = [
        ["", *outcomes],
        row("engines killed", lambda each: each.engine_kills),
        row("engines stopped in order", lambda each: each.engine_stops),
        row("hubs killed", lambda each: each.hub_kills),
        row("hubs stopped in order", lambda each: each.hub_stops),
        row("connections cut, silenced, slowed", lambda each: each.cuts),
        row("emits that had returned", lambda each: each.verdict.returned),
        row("events delivered", lambda each: each.verdict.delivered),
        row("… whose emit had not returned", lambda each: each.verdict.unreturned),
        row("lost with a killed engine, and told", lambda each: each.verdict.covered),
        row("… before its spill was open, not told", lambda each: each.verdict.untold),
        row("gaps told", lambda each: each.verdict.gaps),
        row("violations", lambda each: len(each.verdict.violations)),
    ]
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in rows)


if __name__ == "__main__":
    sys.exit(main())
