"""``safe-broadcaster serve``."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from safe_broadcaster.cli.common import POSITIVE, stop_event

__all__ = ["serve"]


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port to listen on, 0 for any free one.")
@click.option(
    "--log", metavar="FILE", help="Keep the log in this file, so that it survives a restart.  [default: in memory]"
)
@click.option(
    "--replay-events",
    type=int,
    default=10_000,
    show_default=True,
    help="Most events kept for subscribers that come back.",
)
@click.option(
    "--replay-bytes",
    type=int,
    default=16 << 20,
    show_default="16 MiB",
    help="Most bytes kept for them.",
)
@click.option(
    "--token",
    "auth",
    envvar="SAFE_BROADCASTER_TOKEN",
    show_envvar=True,
    help="Let only those in who know it. Others on the machine can read a command line, but not the environment.",
)
@click.option(
    "--allowed-origin",
    "allowed_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let the pages of this site in (https://dash.example); may be given several times.",
)
@click.option("--tls-cert", type=click.Path(dir_okay=False), help="PEM file of a certificate: the port speaks TLS.")
@click.option("--tls-key", type=click.Path(dir_okay=False), help="PEM file of its key.")
@click.option(
    "--redis",
    metavar="URL",
    envvar="SAFE_BROADCASTER_REDIS",
    show_envvar=True,
    help="Share one stream with all hubs of this Redis and channel. The environment keeps a password to itself.",
)
@click.option("--channel", metavar="NAME", default="safe_broadcaster", show_default=True, help="Name of that stream.")
@click.option(
    "--probe-interval",
    type=POSITIVE,
    default=2.0,
    show_default=True,
    help="Seconds between looks whether Redis answers.",
)
@click.option("--stop-on-eof", is_flag=True, help="Stop also when the standard input, a pipe, ends.")
def serve(redis: str | None, channel: str, log: str | None, stop_on_eof: bool, **settings: Any) -> None:
    """A hub with its dashboard, until Ctrl-C or SIGTERM."""
    asyncio.run(_serve(redis, channel, stop_on_eof, {**settings, "log_path": log}))


async def _serve(redis: str | None, channel: str, stop_on_eof: bool, settings: dict[str, Any]) -> None:
    from safe_broadcaster.dashboard import page  # noqa: PLC0415 only a hub needs these
    from safe_broadcaster.hub import EventBroadcaster  # noqa: PLC0415

    stop = stop_event(on_eof=stop_on_eof)
    hub = EventBroadcaster(redis, channel, page=page(), **settings)
    await hub.start()
    try:
        web = "https" if settings["tls_cert"] else "http"
        host = f"[{settings['host']}]" if ":" in settings["host"] else settings["host"]
        click.echo(f"hub        {hub.url}\ndashboard  {web}://{host}:{hub.port}/")
        await stop.wait()
    finally:
        await hub.stop()
