"""What the demo shows in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safe_broadcaster.demo.verdict import Verdict

__all__ = ["Screen", "table"]

CLEAR_LINE = "\r\x1b[2K"


class Screen:
    """Writes lines, and one line of status that a terminal shows in place.

    Args:
        silent: Shows nothing: the output is for a machine.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._in_place = sys.stdout.isatty()
        self._open = False

    def line(self, text: str) -> None:
        """A line that stays."""
        if not self._silent:
            sys.stdout.write(f"{CLEAR_LINE if self._open else ''}{text}\n")
            sys.stdout.flush()
        self._open = False

    def status(self, text: str) -> None:
        """A line that the next one replaces."""
        if self._silent or not self._in_place:
            self.line(text)
            return
        sys.stdout.write(CLEAR_LINE + text)
        sys.stdout.flush()
        self._open = True


def table(verdict: Verdict) -> str:
    """The end of the demo, for people."""
    rows = [
        ("emitted", f"{verdict.emitted:,}", "numbered by the engines themselves"),
        ("delivered", f"{verdict.delivered:,}", "different events at an independent subscriber"),
        ("lost", f"{verdict.lost:,}", ""),
        ("duplicated", f"{verdict.duplicated:,}", ""),
        ("out of order", f"{verdict.out_of_order:,}", ""),
        ("deepest spill", f"{verdict.deepest_spill:,}", "events that waited in one engine while the hub was away"),
        ("longest flush", f"{verdict.longest_flush:.2f} s", "from the return of the link to an empty spill"),
        ("hub killed", f"{verdict.hub_kills}", "times by SIGKILL"),
    ]
    lines = [f"  {name:<16}{value:>12}   {note}".rstrip() for name, value, note in rows]
    lines += [f"  ! {problem}" for problem in verdict.problems]
    end = "Every event arrived, once and in order." if verdict.ok else "FAILED: see above."
    return "\n".join(["", *lines, "", f"  {end}"])
