"""``safe-broadcaster tail``."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click
import orjson

from safe_broadcaster.cli.common import CommandError, stop_event, token_option, url_option, warn
from safe_broadcaster.demo.subscriber import Position, Subscriber

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["tail"]

_KEPT_EVERY = 1.0
"""Seconds between two notes of the position: what a kill may have printed twice."""


@click.command()
@click.option(
    "-m",
    "--match",
    "patterns",
    multiple=True,
    default=("*",),
    metavar="PATTERN",
    help="alert.* is of the type, alert/ada/* (with a slash) of the topic; quote it for the shell. Several: any of "
    "them.  [default: all]",
)
@url_option()
@token_option()
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many events.  [default: at Ctrl-C]")
@click.option("--all", "everything", is_flag=True, help="Begin with the oldest event that the hub still has.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep the position in this file, and go on there next time: nothing that the hub still has is missed.",
)
@click.option("--pretty/--json", default=None, help="For people, or one JSON a line.  [default: pretty on a terminal]")
def tail(
    *,
    patterns: tuple[str, ...],
    url: str,
    token: str | None,
    count: int | None,
    everything: bool,
    resume: Path | None,
    pretty: bool | None,
) -> None:
    """Print a hub's events as they come, across restarts of the hub.

    What was missed is told on the standard error.
    """
    for_people = sys.stdout.isatty() if pretty is None else pretty
    subscribe = partial(Subscriber, url, patterns=patterns, token=token, pause=0.5)
    asyncio.run(_tail(subscribe, _pretty if for_people else _line, count, resume, everything=everything))


async def _tail(
    subscribe: Callable[..., Subscriber],
    form: Callable[[dict[str, Any]], bytes],
    count: int | None,
    resume: Path | None,
    *,
    everything: bool,
) -> None:
    stop = stop_event()
    printer = _Printer(form, count, stop)
    notices = _Notices(is_expected=everything)
    subscriber = subscribe(printer.print, on_notice=notices.tell)
    if everything:
        subscriber.position = Position("", 0)  # of a log that never was: so all of the one that is
    printer.place = _Place(resume, subscriber)
    following, stopped = asyncio.create_task(subscriber.run()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([following, stopped], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (following, stopped):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await following
        printer.place.keep()
    if printer.failure is not None:
        raise printer.failure


class _Printer:
    """Prints events until there are enough, or nobody reads them any more."""

    place: _Place

    def __init__(self, form: Callable[[dict[str, Any]], bytes], count: int | None, stop: asyncio.Event) -> None:
        self.failure: OSError | None = None
        self._form = form
        self._left = count
        self._stop = stop

    def print(self, event: dict[str, Any]) -> None:
        """Print an event."""
        if self._stop.is_set():
            self.place.freeze()  # this one is not printed, and neither are those behind it
            return
        try:
            sys.stdout.buffer.write(self._form(event))
            sys.stdout.buffer.flush()
        except OSError as error:  # whoever read us has gone, or the disk is full
            self.failure = error
            self._stop.set()
            self.place.freeze()
            return
        self.place.moved()
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self._stop.set()


class _Place:
    """Where in the hub's log the last printed event was, in a file."""

    def __init__(self, path: Path | None, subscriber: Subscriber) -> None:
        self._path = path
        self._subscriber = subscriber
        self._kept = monotonic()
        self._known: Position | None = None
        self._last: Position | None = None
        if path is not None and path.exists():
            subscriber.position = self._known = _read(path)

    def freeze(self) -> None:
        """Nothing that comes from now on is printed."""
        self._last = self._last or self._subscriber.position

    def moved(self) -> None:
        """An event was printed; the subscriber's position moves when its call returns."""
        if monotonic() - self._kept >= _KEPT_EVERY:
            self.keep()

    def keep(self) -> None:
        """Note the position."""
        self._kept = monotonic()
        position = self._last or self._subscriber.position
        if self._path is None or position is None or position == self._known:
            return
        part = self._path.with_name(self._path.name + ".part")
        part.write_bytes(orjson.dumps(position._asdict()))
        part.replace(self._path)
        self._known = position


def _read(path: Path) -> Position:
    try:
        kept = orjson.loads(path.read_bytes())
        return Position(str(kept["epoch"]), int(kept["offset"]))
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{path} holds no position ({error}): remove it to begin with what comes now") from error


def _line(event: dict[str, Any]) -> bytes:
    return orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)


def _pretty(event: dict[str, Any]) -> bytes:
    """Time, type, topic, and the rest."""
    rest = {name: value for name, value in event.items() if name not in {"type", "topic", "timestamp"}}
    parts = [
        click.style(datetime.now().astimezone().strftime("%H:%M:%S"), dim=True),
        click.style(_printable(str(event.get("type", "-"))), fg="cyan", bold=True),
        click.style(_printable(str(event.get("topic", ""))), fg="magenta"),
        _printable(orjson.dumps(rest).decode()) if rest else "",
    ]
    line = "  ".join(part for part in parts if click.unstyle(part))
    shown = line if sys.stdout.isatty() else click.unstyle(line)
    return shown.encode(errors="backslashreplace") + b"\n"


def _printable(text: str) -> str:
    """A terminal acts on control characters: they come from whoever emits."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class _Notices:
    """Tells what a reader of a live stream has to know, on the standard error."""

    def __init__(self, *, is_expected: bool) -> None:
        self._is_expected = is_expected
        """That events were missed before the first subscription: they are asked for."""

    def tell(self, frame: dict[str, Any]) -> None:
        """Tell of a frame that is no event."""
        match frame:
            case {"type": "offline", "data": {"reason": str(reason)}}:
                text = f"not connected: {reason}; trying again"
            case {"type": "gap", "data": {"from": first, "to": last, **more}}:
                text = f"gap: {first}..{last} did not come ({more.get('reason', 'unknown')})"
            case {"action": "subscribed", "recovered": False, **more} if not self._is_expected:
                text = f"events were missed while away ({more.get('reason', 'unknown')})"
            case {"type": "error", "data": {"message": str(message)}}:
                text = f"the hub says: {message}"
            case _:
                text = ""
        if frame.get("action") == "subscribed":
            self._is_expected = False
        if text:
            warn(text)
