"""``safe-broadcaster emit``: events from arguments, a file, or the standard input."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from safe_broadcaster.cli.common import (
    POSITIVE,
    CommandError,
    Exit,
    echo_json,
    json_option,
    lines,
    token_option,
    url_option,
    warn,
)
from safe_broadcaster.emitter import SafeBroadcaster
from safe_broadcaster.exceptions import ConnectTimeout

__all__ = ["emit"]

_HINT = "what follows was not sent; --keep-going sends it"


@click.command()
@click.argument("events", nargs=-1, metavar="[EVENT]...")
@click.option("-f", "--file", "path", metavar="FILE", help="One event a line from this file; - is the standard input.")
@click.option(
    "--keep-going", is_flag=True, help="Go on after a line that is no event; the exit code is 1 all the same."
)
@url_option()
@token_option()
@click.option(
    "--spill",
    default=".broadcaster_spill.db",
    show_default=True,
    metavar="PATH",
    help="Where events wait that cannot be delivered now.",
)
@click.option("--timeout", type=POSITIVE, default=10.0, show_default=True, help="Seconds to wait for delivery.")
@json_option("Say at the end what became of them, as JSON.")
def emit(
    *, events: tuple[str, ...], path: str | None, keep_going: bool, url: str, token: str | None, spill: str,
    timeout: float, as_json: bool,
) -> int:  # fmt: skip
    """Send events to a hub: the EVENTs, each a JSON object, or else lines of a file or of the standard input.

    What cannot be delivered in time waits in the spill, and the exit code is 3: the next emit with the same spill takes
    it along.
    """
    if events and path is not None:
        raise click.UsageError("events as arguments or --file, not both")
    sending = _Sending(SafeBroadcaster(url, spill_path=spill, token=token), timeout, keep_going)
    asyncio.run(sending.run(events, path or "-"))
    if as_json:
        echo_json(
            {"accepted": sending.accepted, "refused": sending.refused, "delivered": sending.delivered, "spill": spill}
        )
    if not sending.delivered:
        raise CommandError(
            f"{url} has not confirmed everything within {timeout:g} s: what is missing of {sending.accepted} events "
            f"waits in the spill {spill} and goes out with the next emit from there",
            Exit.WAITING,
        )
    return Exit.FAILED if sending.refused else Exit.DONE


class _Sending:
    """One run, and what became of its events."""

    def __init__(self, broadcaster: SafeBroadcaster, timeout: float, keep_going: bool) -> None:
        self.accepted = self.refused = 0
        self.delivered = False
        self._broadcaster = broadcaster
        self._timeout = timeout
        self._keep_going = keep_going

    async def run(self, events: tuple[str, ...], path: str) -> None:
        deadline = monotonic() + self._timeout
        try:
            with suppress(ConnectTimeout):
                await self._broadcaster.start(timeout=self._timeout)
            if events:
                await self._arguments(events)
            else:
                await self._source(path)
            deadline = max(deadline, monotonic() + self._timeout)
            self.delivered = await self._broadcaster.drain(max(0.0, deadline - monotonic()))
        finally:
            await self._broadcaster.stop(drain_timeout=0.0)

    async def _arguments(self, events: tuple[str, ...]) -> None:
        for number, event in enumerate(events, 1):
            if not await self._emit(event.encode(), f"event {number}") and not self._keep_going:
                if number < len(events):
                    warn(_HINT)
                return

    async def _source(self, path: str) -> None:
        with _opened(path) as source:
            descriptor = source.fileno()
            info = os.fstat(descriptor)
            total = info.st_size if stat.S_ISREG(info.st_mode) else None
            with _bar(total) as bar:
                task = bar.add_task("", total=total, events=0)
                async for number, line in lines(descriptor):
                    if not await self._emit(line, f"line {number}") and not self._keep_going:
                        warn(_HINT)
                        return
                    read = os.lseek(descriptor, 0, os.SEEK_CUR) if total else 0
                    bar.update(task, completed=read, events=self.accepted)

    async def _emit(self, json: bytes, where: str) -> bool:
        try:
            await self._broadcaster.safe_emit(orjson.loads(json))
        except (ValueError, TypeError) as error:
            self.refused += 1
            warn(f"{where} was refused: {error}")
            return False
        self.accepted += 1
        return True


def _opened(path: str) -> AbstractContextManager[IO[Any]]:
    return nullcontext(sys.stdin) if path == "-" else Path(path).open("rb")


def _bar(total: int | None) -> Progress:
    """On the standard error, where that is a terminal; without a length, only a count."""
    bar = (BarColumn(), TaskProgressColumn()) if total else ()
    columns = (TextColumn("{task.fields[events]:,} events"), *bar, TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
