"""What the commands share: options, how they end, and reading without holding up Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click
import orjson

from safe_broadcaster.deadlines import Aside

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = [
    "POSITIVE",
    "PROGRAM",
    "CommandError",
    "Exit",
    "echo_json",
    "json_option",
    "lines",
    "stop_event",
    "token_option",
    "url_option",
    "warn",
]

PROGRAM = "safe-broadcaster"
DEFAULT_URL = "ws://127.0.0.1:8000/ws"
POSITIVE = click.FloatRange(min=0, min_open=True)

_CHUNK = 1 << 16
_LONGEST_LINE = 64 << 20
"""Bytes of a line from which on it is none: far above the largest event, and a bound for what has no line ends."""


class Exit:
    """The exit codes."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    WAITING = 3
    INTERRUPTED = 130


class CommandError(RuntimeError):
    """A command failed; the message is what the user reads.

    Args:
        code: The exit code.
    """

    def __init__(self, message: str, code: int = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code


def url_option(text: str = "The hub.") -> Callable[[Any], Any]:
    """``--url``, or ``$SAFE_BROADCASTER_URL``."""
    return click.option(
        "--url", default=DEFAULT_URL, envvar="SAFE_BROADCASTER_URL", show_default=True, show_envvar=True, help=text
    )


def token_option() -> Callable[[Any], Any]:
    """``--token``, or ``$SAFE_BROADCASTER_TOKEN``."""
    return click.option(
        "--token",
        envvar="SAFE_BROADCASTER_TOKEN",
        show_envvar=True,
        help="For a hub that asks for one. Others on the machine can read a command line, but not the environment.",
    )


def json_option(text: str = "As JSON, for programs.") -> Callable[[Any], Any]:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def echo_json(value: object) -> None:
    """One line of JSON on the standard output."""
    click.echo(orjson.dumps(value).decode())


def warn(text: str) -> None:
    """One line on the standard error, under the name of the command."""
    command = click.get_current_context().info_name
    click.echo(f"{PROGRAM} {command}: {text}".replace("\n", " "), err=True)


def stop_event(*, on_eof: bool = False) -> asyncio.Event:
    """Set by SIGINT and SIGTERM, and where wanted by the end of the standard input."""
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
