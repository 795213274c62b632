"""``safe-broadcaster emit``."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import orjson

from safe_broadcaster.cli.common import DEFAULT_URL, PROGRAM, CommandError, lines, positive
from safe_broadcaster.emitter import SafeBroadcaster
from safe_broadcaster.exceptions import ConnectTimeout

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator

__all__ = ["TEXT", "add", "run"]

TEXT = "send events to a hub: from an argument, a file or the standard input, one JSON a line"

_SHOWN_EVERY = 0.1
"""Seconds between two looks at the progress."""
_BAR = 20
"""Characters of the bar."""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("event", nargs="?", help="one event as JSON; without it, JSON lines from the standard input")
    source.add_argument("--file", type=Path, metavar="FILE", help="JSON lines from this file")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the hub (default: {DEFAULT_URL})")
    parser.add_argument(
        "--spill",
        default=".broadcaster_spill.db",
        metavar="PATH",
        help="where events wait that cannot be delivered now (default: .broadcaster_spill.db)",
    )
    parser.add_argument("--timeout", type=positive, default=10.0, help="seconds to wait for delivery (default: 10)")
    parser.add_argument(
        "--keep-going", action="store_true", help="go on after a line that is no event; the exit code is 1 all the same"
    )
    parser.add_argument("--json", action="store_true", help="print what became of them as a JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Run it."""
    return asyncio.run(_Emission(arguments).run())


class _Emission:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._broadcaster = SafeBroadcaster(arguments.url, spill_path=arguments.spill)
        self._accepted = self._refused = 0
        self._shows = sys.stderr.isatty()
        self._shown = 0.0
        self._input: int | None = None
        self._size = 0

    async def run(self) -> int:
        patience: float = self._arguments.timeout
        deadline = monotonic() + patience
        delivered = False
        try:
            with suppress(ConnectTimeout):
                await self._broadcaster.start(timeout=patience)
            async for number, line in self._lines():
                if not await self._emit(number, line) and not self._arguments.keep_going:
                    print(f"{PROGRAM} emit: what follows was not read; --keep-going reads it", file=sys.stderr)
                    break
                deadline = max(deadline, monotonic() + patience)
                self._show()
            while not delivered and monotonic() < deadline:
                delivered = await self._broadcaster.drain(min(_SHOWN_EVERY, deadline - monotonic()))
                self._show()
        finally:
            self._show(over=True)
            await self._broadcaster.stop(drain_timeout=0.0)
        return self._judge(delivered=delivered)

    async def _lines(self) -> AsyncIterator[tuple[int, bytes]]:
        if self._arguments.event is not None:
            yield 1, self._arguments.event.encode()
            return
        with nullcontext(sys.stdin) if self._arguments.file is None else self._arguments.file.open("rb") as source:
            self._input = source.fileno()
            self._size = os.fstat(self._input).st_size
            async for each in lines(self._input):
                yield each

    async def _emit(self, number: int, line: bytes) -> bool:
        try:
            await self._broadcaster.safe_emit(orjson.loads(line))
        except (ValueError, TypeError) as error:
            self._refused += 1
            self._show(over=True)
            print(f"{PROGRAM} emit: line {number} was refused: {error}", file=sys.stderr)
            return False
        self._accepted += 1
        return True

    def _judge(self, *, delivered: bool) -> int:
        arguments = self._arguments
        if arguments.json:
            outcome = {"accepted": self._accepted, "refused": self._refused, "delivered": delivered}
            print(json.dumps(outcome | {"spill": arguments.spill}))
        if not delivered:
            raise CommandError(
                f"{arguments.url} has not confirmed everything within {arguments.timeout:g} s: what is missing of "
                f"{self._accepted} events waits in the spill {arguments.spill} and goes out with the next emit from "
                "there"
            )
        return 1 if self._refused else 0

    def _show(self, *, over: bool = False) -> None:
        """Show people how far it is, in a line of its own that is gone in the end."""
        if not self._shows or (monotonic() - self._shown < _SHOWN_EVERY and not over):
            return
        self._shown = monotonic()
        stats = self._broadcaster.get_stats()
        waiting = stats["last_seq"] - stats["acked_seq"]
        text = "" if over else f"{self._bar()}{self._accepted} accepted, {waiting} on their way"
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()

    def _bar(self) -> str:
        """How much of the input was read, where it has an end."""
        if not self._size or self._input is None:
            return ""
        share = os.lseek(self._input, 0, os.SEEK_CUR) / self._size
        return f"[{'#' * int(share * _BAR):.<{_BAR}}] {share:4.0%}  "
