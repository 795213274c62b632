"""The command line: ``safe-broadcaster demo | serve | emit | tail | spill | doctor | bench | completion``.

Exit codes: 0 done · 1 it failed, and one line on the standard error says why · 2 the command line is wrong ·
130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from typing import TYPE_CHECKING

import safe_broadcaster
from safe_broadcaster.cli import bench, completion, demo, doctor, emit, serve, spill, tail
from safe_broadcaster.cli.common import PROGRAM, CommandError
from safe_broadcaster.exceptions import BroadcastError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["build_parser", "main"]

INTERRUPTED = 130

_COMMANDS = {
    "demo": demo,
    "serve": serve,
    "emit": emit,
    "tail": tail,
    "spill": spill,
    "doctor": doctor,
    "bench": bench,
    "completion": completion,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``safe-broadcaster``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    # The broadcaster warns of what a command tells in its own words.
    logging.getLogger(safe_broadcaster.__name__).addHandler(logging.NullHandler())
    try:
        return command(arguments)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    except BrokenPipeError:
        # Who read us has gone; without this the interpreter would complain once more as it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CommandError, BroadcastError, OSError, TypeError, ValueError) as error:
        print(f"{PROGRAM} {arguments.name}: {error}".replace("\n", " "), file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Build the whole command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Carries events from Python engines to live dashboards without losing one silently."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {safe_broadcaster.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        text = command.TEXT
        sub = commands.add_parser(name, help=text.partition(":")[0], description=text[0].upper() + text[1:] + ".")
        command.add(sub)
        sub.set_defaults(command=command.run, name=name, parser=parser)
    return parser
