"""The command line: ``safe-broadcaster demo | serve | emit | tail | spill | doctor``.

Exit codes: 0 done · 1 it failed, and one line on the standard error says why · 2 the command line is wrong ·
130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson

import safe_broadcaster
from safe_broadcaster.emitter import SafeBroadcaster
from safe_broadcaster.exceptions import BroadcastError, ConnectTimeout
from safe_broadcaster.spill_command import add_spill, spill

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

__all__ = ["build_parser", "main"]

PROGRAM = "safe-broadcaster"
DEFAULT_URL = "ws://127.0.0.1:8000/ws"
NOBODY = "ws://127.0.0.1:9/ws"
"""The discard port (RFC 863): no hub is there."""

INTERRUPTED = 130


class CommandError(RuntimeError):
    """A command failed; the message is what the user reads."""


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
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Carries events from Python engines to live dashboards without losing one silently."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {safe_broadcaster.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, add, command, text in _COMMANDS:
        sub = commands.add_parser(name, help=text.partition(":")[0], description=text[0].upper() + text[1:] + ".")
        add(sub)
        sub.set_defaults(command=command, name=name)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=_positive, default=40.0, help="how long the engines run (default: 40)")
    parser.add_argument("--rate", type=_positive, default=1000.0, help="events a second of each engine (default: 1000)")
    parser.add_argument(
        "--port", type=int, help="port of the hub and its page (default: 8000, or any if that is taken)"
    )
    parser.add_argument("--keep", action="store_true", help="go on until Ctrl-C; the verdict comes then")
    parser.add_argument("--json", action="store_true", help="print only the verdict, as JSON")


def _demo(arguments: argparse.Namespace) -> int:
    from safe_broadcaster.demo.processes import DemoError  # noqa: PLC0415 the other commands do not need it
    from safe_broadcaster.demo.show import Options, show  # noqa: PLC0415

    options = Options(arguments.seconds, arguments.rate, arguments.port, arguments.keep, arguments.json)
    try:
        return show(options)
    except DemoError as error:
        raise CommandError(str(error)) from error


def _add_serve(parser: argparse.ArgumentParser) -> None:
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
        type=_positive,
        default=2.0,
        metavar="SECONDS",
        help="how often the connection to Redis is tried (default: 2)",
    )
    parser.add_argument("--stop-on-eof", action="store_true", help="stop also when the standard input, a pipe, ends")


def _serve(arguments: argparse.Namespace) -> int:
    asyncio.run(_run_hub(arguments))
    return 0


async def _run_hub(arguments: argparse.Namespace) -> None:
    from safe_broadcaster.dashboard import page  # noqa: PLC0415 only a hub needs these
    from safe_broadcaster.hub import EventBroadcaster  # noqa: PLC0415

    settings: dict[str, Any] = {"page": page(), "replay_events": arguments.replay_events}
    settings["replay_bytes"] = arguments.replay_bytes
    settings["log_path"] = arguments.log
    stop = _stop_event(on_eof=arguments.stop_on_eof)
    settings["probe_interval"] = arguments.probe_interval
    hub = EventBroadcaster(arguments.redis, arguments.channel, host=arguments.host, port=arguments.port, **settings)
    await hub.start()
    try:
        print(f"hub        {hub.url}\ndashboard  http://{arguments.host}:{hub.port}/", flush=True)
        await stop.wait()
    finally:
        await hub.stop()


def _add_emit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("event", nargs="?", help="one event as JSON; without it, JSON lines from the standard input")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the hub (default: {DEFAULT_URL})")
    parser.add_argument(
        "--spill",
        default=".broadcaster_spill.db",
        metavar="PATH",
        help="where events wait that cannot be delivered now (default: .broadcaster_spill.db)",
    )
    parser.add_argument("--timeout", type=_positive, default=10.0, help="seconds to wait for delivery (default: 10)")


def _emit(arguments: argparse.Namespace) -> int:
    return asyncio.run(_run_emit(arguments))


async def _run_emit(arguments: argparse.Namespace) -> int:
    broadcaster = SafeBroadcaster(arguments.url, spill_path=arguments.spill)
    deadline = monotonic() + arguments.timeout
    accepted = refused = 0
    delivered = False
    try:
        with suppress(ConnectTimeout):
            await broadcaster.start(timeout=arguments.timeout)
        async for number, line in _lines(arguments.event):
            try:
                await broadcaster.safe_emit(orjson.loads(line))
                accepted += 1
            except (ValueError, TypeError) as error:
                refused += 1
                print(f"{PROGRAM} emit: event {number} was refused: {error}", file=sys.stderr)
            deadline = max(deadline, monotonic() + arguments.timeout)
        delivered = await broadcaster.drain(max(0.0, deadline - monotonic()))
    finally:
        await broadcaster.stop(drain_timeout=0.0)
    if not delivered:
        raise CommandError(
            f"{arguments.url} has not confirmed everything within {arguments.timeout:g} s: what is missing of "
            f"{accepted} events waits in the spill {arguments.spill} and goes out with the next emit from there"
        )
    return 1 if refused else 0


async def _lines(event: str | None) -> AsyncIterator[tuple[int, bytes]]:
    """Numbered lines that are not empty, as soon as they come."""
    if event is not None:
        yield 1, event.encode()
        return
    rest, number = b"", 0
    while data := await asyncio.to_thread(os.read, sys.stdin.fileno(), 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        for line in filter(bytes.strip, lines):
            number += 1
            yield number, line
    if rest.strip():
        yield number + 1, rest


def _add_tail(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pattern",
        nargs="*",
        default=["*"],
        help="alert.* is of the type, alert/ada/* (with a slash) of the topic; quote it for the shell (default: all)",
    )
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the hub (default: {DEFAULT_URL})")
    parser.add_argument("--count", type=int, metavar="N", help="end after N events (default: go on until Ctrl-C)")
    parser.add_argument(
        "--token", help="for a hub that asks for one (better in the environment: SAFE_BROADCASTER_TOKEN)"
    )


def _tail(arguments: argparse.Namespace) -> int:
    asyncio.run(_run_tail(arguments))
    return 0


async def _run_tail(arguments: argparse.Namespace) -> None:
    from safe_broadcaster.demo.subscriber import Subscriber  # noqa: PLC0415 only tail needs it

    stop = _stop_event()
    failure: list[BaseException] = []
    left = arguments.count

    def write(event: dict[str, Any]) -> None:
        nonlocal left
        if stop.is_set():
            return
        try:
            sys.stdout.buffer.write(orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE))
            sys.stdout.buffer.flush()
        except BrokenPipeError as error:
            failure.append(error)
            stop.set()
        if left is not None:
            left -= 1
            if left <= 0:
                stop.set()

    token = arguments.token or os.environ.get("SAFE_BROADCASTER_TOKEN")
    subscriber = Subscriber(
        arguments.url, write, patterns=arguments.pattern, on_notice=_print_notice, token=token, pause=0.5
    )
    following, stopped = asyncio.create_task(subscriber.run()), asyncio.create_task(stop.wait())
    await asyncio.wait([following, stopped], return_when=asyncio.FIRST_COMPLETED)
    for task in (following, stopped):
        task.cancel()
    with suppress(asyncio.CancelledError):
        await following
    for error in failure:
        raise error


def _print_notice(frame: dict[str, Any]) -> None:
    """What a reader of a live stream has to know, on the standard error."""
    match frame:
        case {"type": "offline", "data": {"reason": str(reason)}}:
            text = f"not connected: {reason}; trying again"
        case {"type": "gap", "data": {"from": first, "to": last, **more}}:
            text = f"gap: {first}..{last} did not come ({more.get('reason', 'unknown')})"
        case {"action": "subscribed", "recovered": False, **more}:
            text = f"events were missed while away ({more.get('reason', 'unknown')})"
        case {"type": "error", "data": {"message": str(message)}}:
            text = f"the hub says: {message}"
        case _:
            return
    print(f"{PROGRAM} tail: {text}", file=sys.stderr)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="a hub to reach (default: none is tried)")


def _doctor(arguments: argparse.Namespace) -> int:
    print(f"{PROGRAM} {safe_broadcaster.__version__}")
    print(f"python {platform.python_version()} ({platform.python_implementation()}), orjson {orjson.__version__}")
    print(f"{platform.platform()}, {os.cpu_count()} cores")
    checks = [_check(f"a spill in {Path.cwd()}", _check_spill())]
    if arguments.url:
        checks.append(_check(arguments.url, _check_url(arguments.url)))
    return 0 if all(checks) else 1


def _check(what: str, check: Any) -> bool:
    try:
        asyncio.run(check)
    except (BroadcastError, OSError, asyncio.TimeoutError, CommandError) as error:
        print(f"FAIL  {what}: {error or type(error).__name__}")
        return False
    print(f"ok    {what}")
    return True


async def _check_spill() -> None:
    """Stores an event here with nobody to send it to, and finds it again as a later process would."""
    with tempfile.TemporaryDirectory(prefix=".safe-broadcaster-doctor-", dir=Path.cwd()) as folder:
        path = str(Path(folder) / "spill.db")
        for stored in (0, 1):
            broadcaster = SafeBroadcaster(NOBODY, spill_path=path)
            try:
                with suppress(ConnectTimeout):
                    await broadcaster.start(timeout=0.2)
                if len(broadcaster.spill) != stored:
                    raise CommandError("what was stored is not there")
                if not stored:
                    await broadcaster.safe_emit({"type": "doctor.check"})
            finally:
                await broadcaster.stop(drain_timeout=0.0)


async def _check_url(url: str) -> None:
    from safe_broadcaster.demo.subscriber import connect  # noqa: PLC0415 only here

    _, writer = await asyncio.wait_for(connect(url), timeout=5.0)
    writer.close()


def _stop_event(*, on_eof: bool = False) -> asyncio.Event:
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


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


_DEMO = (
    "a hub that is killed twice: three engines emit the import graph of this Python, the hub gets SIGKILL at a third "
    "and at two thirds of the time, and an independent subscriber counts what arrived"
)

_COMMANDS: tuple[
    tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str], ...
] = (
    ("demo", _add_demo, _demo, _DEMO),
    ("serve", _add_serve, _serve, "a hub with its dashboard: runs until Ctrl-C or SIGTERM"),
    ("emit", _add_emit, _emit, "send events to a hub: from an argument or from the standard input, one JSON a line"),
    ("tail", _add_tail, _tail, "print a hub's events as they come: one JSON a line, across reconnects"),
    ("spill", add_spill, spill, "look into a spill, check it, take events out of it, have parked ones sent again"),
    ("doctor", _add_doctor, _doctor, "check this installation: versions, a spill in this folder, a hub"),
)

if __name__ == "__main__":
    sys.exit(main())
