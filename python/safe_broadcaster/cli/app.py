"""The commands together, and how they end.

Exit codes: 0 done · 1 it failed, and one line on the standard error says why · 2 the command line is wrong · 3 nothing
is lost, but events wait in the spill · 130 interrupted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import click

import safe_broadcaster
from safe_broadcaster.cli.bench import bench
from safe_broadcaster.cli.common import PROGRAM, CommandError, Exit
from safe_broadcaster.cli.completion import completion
from safe_broadcaster.cli.demo import demo
from safe_broadcaster.cli.doctor import doctor
from safe_broadcaster.cli.emit import emit
from safe_broadcaster.cli.serve import serve
from safe_broadcaster.cli.spill import spill
from safe_broadcaster.cli.tail import tail
from safe_broadcaster.exceptions import BroadcastError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["app", "run"]


class _App(click.Group):
    """Says in one line what went wrong, and of which command."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 click's signature
        return list(self.commands)  # as a newcomer meets them, not by the alphabet

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Who read us has gone; without this the interpreter would complain once more as it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return Exit.DONE
        except (CommandError, BroadcastError, OSError, TypeError, ValueError) as error:
            click.echo(f"{PROGRAM} {ctx.invoked_subcommand}: {error}".replace("\n", " "), err=True)
            return error.code if isinstance(error, CommandError) else Exit.FAILED


@click.group(cls=_App, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(safe_broadcaster.__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def app() -> None:
    """Carries events from Python engines to live dashboards without losing one silently."""


for command in (demo, serve, emit, tail, spill, doctor, bench, completion):
    app.add_command(command)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # The broadcaster warns of what a command tells in its own words.
    logging.getLogger(safe_broadcaster.__name__).addHandler(logging.NullHandler())
    try:
        code = app.main(None if argv is None else list(argv), prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:  # help is what was asked for, but not in words
        error.show()
        return Exit.USAGE
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt, asyncio.CancelledError):
        return Exit.INTERRUPTED
    return code if isinstance(code, int) else Exit.DONE
