"""``safe-broadcaster tail``."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson

from safe_broadcaster.cli.common import DEFAULT_URL, PROGRAM, CommandError, stop_event

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from safe_broadcaster.demo.subscriber import Position, Subscriber

__all__ = ["TEXT", "add", "run"]

TEXT = "print a hub's events as they come: one JSON a line, or for people where the output is a terminal"

_KEPT_EVERY = 1.0
"""Seconds between two notes of the position: what a kill may have printed twice."""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    parser.add_argument(
        "pattern",
        nargs="*",
        help="alert.* is of the type, alert/ada/* (with a slash) of the topic; quote it for the shell (default: all)",
    )
    parser.add_argument("--match", action="append", default=[], metavar="PATTERN", help="the same, as an option")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the hub (default: {DEFAULT_URL})")
    parser.add_argument("--count", type=int, metavar="N", help="end after N events (default: go on until Ctrl-C)")
    parser.add_argument("--all", action="store_true", help="begin with the oldest event that the hub still has")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep the position in this file, and go on there next time: nothing that the hub still has is missed",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON a line, whatever the output is")
    form.add_argument("--pretty", action="store_true", help="for people, whatever the output is")
    parser.add_argument(
        "--token", help="for a hub that asks for one (better in the environment: SAFE_BROADCASTER_TOKEN)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run it."""
    asyncio.run(_tail(arguments))
    return 0


async def _tail(arguments: argparse.Namespace) -> None:
    from safe_broadcaster.demo.subscriber import Position, Subscriber  # noqa: PLC0415 - only tail needs it

    stop = stop_event()
    for_people = arguments.pretty or (sys.stdout.isatty() and not arguments.json)
    printer = _Printer(_pretty if for_people else _line, arguments.count, stop)
    subscriber = Subscriber(
        arguments.url,
        printer.print,
        patterns=[*arguments.pattern, *arguments.match] or ["*"],
        on_notice=_Notices(is_expected=arguments.all).tell,
        token=arguments.token or os.environ.get("SAFE_BROADCASTER_TOKEN"),
        pause=0.5,
    )
    if arguments.all:
        subscriber.position = Position("", 0)  # of a log that never was: so all of the one that is
    printer.place = _Place(arguments.resume, subscriber)
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
    from safe_broadcaster.demo.subscriber import Position  # noqa: PLC0415 - as above

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
    now = datetime.now().astimezone().strftime("%H:%M:%S")
    parts = [now, str(event.get("type", "-")), str(event.get("topic", "")), orjson.dumps(rest).decode() if rest else ""]
    text = "  ".join(filter(None, parts))
    # A terminal acts on control characters: they come from whoever emits.
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    return shown.encode(errors="backslashreplace") + b"\n"


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
            print(f"{PROGRAM} tail: {text}", file=sys.stderr)
