"""What the commands share: their errors, their stop, and reading without holding up Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from safe_broadcaster.deadlines import Aside

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["DEFAULT_URL", "PROGRAM", "CommandError", "lines", "positive", "stop_event"]

PROGRAM = "safe-broadcaster"
DEFAULT_URL = "ws://127.0.0.1:8000/ws"

_CHUNK = 1 << 16
_LONGEST_LINE = 64 << 20
"""Bytes of a line from which on it is none: far above the largest event, and a bound for what has no line ends."""


class CommandError(RuntimeError):
    """A command failed; the message is what the user reads."""


def positive(text: str) -> float:
    """Read a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def stop_event(*, on_eof: bool = False) -> asyncio.Event:
    """Return what SIGINT and SIGTERM set, and where wanted the end of the standard input."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def readable() -> None:
        if not os.read(sys.stdin.fileno(), 1024):
            loop.remove_reader(sys.stdin)
            stop.set()

    if on_eof:
        loop.add_reader(sys.stdin, readable)
    return stop


async def lines(descriptor: int) -> AsyncIterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, as soon as they come; blank ones are counted.

    Read is in a thread that nobody waits for: in one of an executor's, Ctrl-C would wait for the next line.
    """
    read = Aside(lambda: os.read(descriptor, _CHUNK), "safe_broadcaster lines")
    number, parts, size = 1, list[bytes](), 0
    while data := await read():
        first, *more = data.split(b"\n")
        parts.append(first)
        size += len(first)
        if size > _LONGEST_LINE:
            _refuse(number)
        for rest in more:
            if (line := b"".join(parts)).strip():
                yield number, line
            number, parts, size = number + 1, [rest], len(rest)
    if (line := b"".join(parts)).strip():
        yield number, line


def _refuse(number: int) -> NoReturn:
    raise CommandError(f"line {number} is longer than {_LONGEST_LINE >> 20} MiB: give one JSON object a line")
