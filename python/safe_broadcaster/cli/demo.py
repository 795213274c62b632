"""``safe-broadcaster demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safe_broadcaster.cli.common import CommandError, positive

if TYPE_CHECKING:
    import argparse

__all__ = ["TEXT", "add", "run"]

TEXT = (
    "a hub that is killed twice: three engines emit the import graph of this Python, the hub gets SIGKILL at a third "
    "and at two thirds of the time, and an independent subscriber counts what arrived"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    parser.add_argument("--seconds", type=positive, default=40.0, help="how long the engines run (default: 40)")
    parser.add_argument("--rate", type=positive, default=1000.0, help="events a second of each engine (default: 1000)")
    parser.add_argument(
        "--port", type=int, help="port of the hub and its page (default: 8000, or any if that is taken)"
    )
    parser.add_argument("--keep", action="store_true", help="go on until Ctrl-C; the verdict comes then")
    parser.add_argument("--json", action="store_true", help="print only the verdict, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run it."""
    from safe_broadcaster.demo.processes import DemoError  # noqa: PLC0415 - the other commands do not need it
    from safe_broadcaster.demo.show import Options, show  # noqa: PLC0415

    options = Options(arguments.seconds, arguments.rate, arguments.port, arguments.keep, arguments.json)
    try:
        return show(options)
    except DemoError as error:
        raise CommandError(str(error)) from error
