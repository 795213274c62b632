"""``safe-broadcaster serve``."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from safe_broadcaster.cli.common import positive, stop_event

if TYPE_CHECKING:
    import argparse

__all__ = ["TEXT", "add", "run"]

TEXT = "a hub with its dashboard: runs until Ctrl-C or SIGTERM"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any free one (default: 8000)")
    parser.add_argument(
        "--log", metavar="FILE", help="keep the log in this file, so that it survives a restart (default: in memory)"
    )
    parser.add_argument(
        "--replay-events",
        type=int,
        default=10_000,
        metavar="N",
        help="most events kept for subscribers that come back (default: 10000)",
    )
    parser.add_argument(
        "--replay-bytes", type=int, default=16 << 20, metavar="N", help="most bytes kept for them (default: 16 MiB)"
    )
    parser.add_argument(
        "--redis",
        metavar="URL",
        default=os.environ.get("SAFE_BROADCASTER_REDIS"),
        help="share one stream with all hubs of this Redis and channel (default: $SAFE_BROADCASTER_REDIS, which, other "
        "than a command line, does not show a password to everybody)",
    )
    parser.add_argument(
        "--channel", metavar="NAME", default="safe_broadcaster", help="name of that stream (default: safe_broadcaster)"
    )
    parser.add_argument(
        "--probe-interval",
        type=positive,
        default=2.0,
        metavar="SECONDS",
        help="how often the connection to Redis is tried (default: 2)",
    )
    parser.add_argument("--stop-on-eof", action="store_true", help="stop also when the standard input, a pipe, ends")


def run(arguments: argparse.Namespace) -> int:
    """Run it."""
    asyncio.run(_serve(arguments))
    return 0


async def _serve(arguments: argparse.Namespace) -> None:
    from safe_broadcaster.dashboard import page  # noqa: PLC0415 - only a hub needs these
    from safe_broadcaster.hub import EventBroadcaster  # noqa: PLC0415

    settings: dict[str, Any] = {"page": page(), "replay_events": arguments.replay_events}
    settings["replay_bytes"] = arguments.replay_bytes
    settings["log_path"] = arguments.log
    stop = stop_event(on_eof=arguments.stop_on_eof)
    settings["probe_interval"] = arguments.probe_interval
    hub = EventBroadcaster(arguments.redis, arguments.channel, host=arguments.host, port=arguments.port, **settings)
    await hub.start()
    try:
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"hub        {hub.url}\ndashboard  http://{host}:{hub.port}/", flush=True)
        await stop.wait()
    finally:
        await hub.stop()
