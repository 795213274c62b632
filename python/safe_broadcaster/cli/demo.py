"""``safe-broadcaster demo``."""

from __future__ import annotations

import click

from safe_broadcaster.cli.common import POSITIVE, CommandError, json_option

__all__ = ["demo"]


@click.command()
@click.option("--seconds", type=POSITIVE, default=40.0, show_default=True, help="How long the engines run.")
@click.option("--rate", type=POSITIVE, default=1000.0, show_default=True, help="Events a second of each engine.")
@click.option("--port", type=int, help="Port of the hub and its page.  [default: 8000, or any if that is taken]")
@click.option("--keep", is_flag=True, help="Go on until Ctrl-C; the verdict comes then.")
@json_option("Print only the verdict, as JSON.")
def demo(seconds: float, rate: float, port: int | None, keep: bool, as_json: bool) -> int:
    """A hub that is killed twice, three engines and a page.

    The engines emit the import graph of this Python; the hub gets SIGKILL at a third and at two thirds of the time, and
    an independent subscriber counts what arrived. The exit code is 1 if anything was lost, doubled or out of order.
    """
    from safe_broadcaster.demo.processes import DemoError  # noqa: PLC0415 the other commands do not need it
    from safe_broadcaster.demo.show import Options, show  # noqa: PLC0415

    try:
        return show(Options(seconds, rate, port, keep, as_json))
    except DemoError as error:
        raise CommandError(str(error)) from error
