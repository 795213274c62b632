"""``safe-broadcaster doctor``: what would go wrong here, and what to do about it."""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple

import click
import orjson

from safe_broadcaster import _core
from safe_broadcaster.cli.common import PROGRAM, CommandError, Exit, echo_json, json_option
from safe_broadcaster.cli.redis import RedisError, ask_redis
from safe_broadcaster.config import EmitterConfig
from safe_broadcaster.emitter import SafeBroadcaster
from safe_broadcaster.exceptions import BroadcastError, ConnectTimeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

__all__ = ["doctor"]

_NOBODY = "ws://127.0.0.1:9/ws"
"""The discard port (RFC 863): no hub is there."""

_PATIENCE = 5.0
"""Seconds that a hub or a Redis may take to answer."""

_FEW_FILES = 4096
"""Open files below which a hub soon has too few: each session takes one."""

_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "afs", "ceph", "glusterfs", "fuse.glusterfs"}
"""File systems on which neither a memory-mapped file nor SQLite's log is safe."""

_OLDEST_REDIS = (6, 2)

_SYNCS = 5
_SLOW_SYNC = 0.05
"""Seconds from which a sync is slow: a spinning disk takes less."""


class _Finding(NamedTuple):
    """What a check found."""

    state: Literal["ok", "warn", "FAIL"]
    what: str
    advice: str | None = None


_COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "red"}


@click.command()
@click.option("--url", help="A hub to reach.  [default: none is tried]")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=".",
    show_default=True,
    help="Where spills and logs will be.",
)
@click.option("--port", type=int, default=8000, show_default=True, help="The port of a hub to be.")
@click.option(
    "--redis",
    metavar="URL",
    envvar="SAFE_BROADCASTER_REDIS",
    show_envvar=True,
    help="A Redis to ask.  [default: none is]",
)
@json_option("The findings as one JSON object.")
def doctor(*, url: str | None, folder: Path, port: int, redis: str | None, as_json: bool) -> int:
    """Check this machine: versions, the disk, limits, ports, a Redis and a hub.

    Each finding is ok, warn or FAIL, with what to do; the exit code is 1 after a FAIL. Nothing is left behind.
    """
    versions = {
        PROGRAM: _core.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "orjson": orjson.__version__,
        "platform": f"{platform.platform()}, {os.cpu_count()} cores",
    }
    findings = asyncio.run(_all(folder.resolve(), port, redis, url))
    if as_json:
        echo_json({"versions": versions, "findings": [each._asdict() for each in findings]})
    else:
        for name, version in versions.items():
            click.echo(f"      {name} {version}")
        for finding in findings:
            click.echo(f"{click.style(f'{finding.state:4}', fg=_COLOURS[finding.state])}  {finding.what}")
            if finding.advice is not None:
                click.echo(f"      → {finding.advice}")
    return Exit.FAILED if any(finding.state == "FAIL" for finding in findings) else Exit.DONE


async def _all(folder: Path, port: int, redis: str | None, url: str | None) -> list[_Finding]:
    findings = [await _tried(f"a spill in {folder}", lambda: _spill(folder), "give a folder where you may write")]
    if findings[0].state == "ok":
        findings += [*_disk(folder), _sync(folder)]
    findings += [_files(), _port(port)]
    if redis:
        findings.append(await _redis(redis))
    if url:
        findings.append(await _tried(url, lambda: _hub(url), "start one there: safe-broadcaster serve"))
    return findings


async def _tried(what: str, check: Callable[[], Awaitable[None]], advice: str) -> _Finding:
    try:
        await check()
    except (BroadcastError, OSError, asyncio.TimeoutError, CommandError) as error:
        return _Finding("FAIL", f"{what}: {str(error) or type(error).__name__}", advice)
    return _Finding("ok", what)


async def _spill(folder: Path) -> None:
    """Store an event there with nobody to send it to, and find it again as a later process would."""
    with tempfile.TemporaryDirectory(prefix=".safe-broadcaster-doctor-", dir=folder) as place:
        path = str(Path(place) / "spill.db")
        for stored in (0, 1):
            broadcaster = SafeBroadcaster(_NOBODY, spill_path=path)
            try:
                with suppress(ConnectTimeout):
                    await broadcaster.start(timeout=0.2)
                if len(broadcaster.spill) != stored:
                    raise CommandError("what was stored is not there")
                if not stored:
                    await broadcaster.safe_emit({"type": "doctor.check"})
            finally:
                await broadcaster.stop(drain_timeout=0.0)


def _disk(folder: Path) -> Iterator[_Finding]:
    kind = _file_system(folder)
    if kind in _REMOTE:
        advice = "put spill_path and log_path on a local disk: files of another machine can be lost or torn"
        yield _Finding("warn", f"the file system is {kind}", advice)
    free, wanted = shutil.disk_usage(folder).free, EmitterConfig().spill_max_bytes
    text = f"{free / 2**30:.1f} GiB are free; a spill takes up to {wanted / 2**30:.1f} GiB"
    if free < wanted:
        yield _Finding("warn", text, "make room, or lower spill_max_bytes")
    else:
        yield _Finding("ok", text)


def _file_system(folder: Path) -> str:
    """Return the kind of the file system, where the system tells."""
    kind, longest = "", -1
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            _, point, named, *_ = line.split(" ")
            here = point.encode().decode("unicode_escape")  # a blank stands there as \040
            if folder.is_relative_to(here) and len(here) > longest:
                kind, longest = named, len(here)
    return kind


def _sync(folder: Path) -> _Finding:
    """What an emit at ``durability="power"`` waits for here."""
    took: list[float] = []
    with tempfile.TemporaryFile(prefix=".safe-broadcaster-doctor-", dir=folder) as file:
        for _ in range(_SYNCS):
            file.write(bytes(4096))
            file.flush()
            began = perf_counter()
            os.fdatasync(file.fileno())
            took.append(perf_counter() - began)
    median = sorted(took)[_SYNCS // 2]
    text = f"what is written is on the disk after {median * 1e3:.2f} ms (median of {_SYNCS})"
    if median > _SLOW_SYNC:
        return _Finding("warn", text, 'emits at durability="power" wait so long: gather them, or take "process"')
    return _Finding("ok", text)


def _files() -> _Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} files may be open; each session of a hub takes one"
    if soft >= _FEW_FILES or soft == resource.RLIM_INFINITY:
        return _Finding("ok", text)
    return _Finding("warn", text, f"raise the limit before you start a hub: ulimit -n {min(hard, 65_536)}")


def _port(port: int) -> _Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            advice = f"choose another by --port, or see who has it: ss -ltnp 'sport = :{port}'"
            return _Finding("warn", f"port {port} cannot be had: {os.strerror(error.errno or 0)}", advice)
    return _Finding("ok", f"port {port} is free")


async def _redis(url: str) -> _Finding:
    try:
        told = await asyncio.wait_for(ask_redis(url), _PATIENCE)
    except (RedisError, OSError, EOFError, asyncio.TimeoutError) as error:
        why = str(error) or type(error).__name__
        return _Finding("FAIL", f"Redis: {why}", "start it, or correct the address: redis://user:password@host:6379/0")
    version = told.get("redis_version", "unknown")
    text = f"Redis {version}"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < _OLDEST_REDIS:
        return _Finding("FAIL", text, "take Redis 6.2 or newer")
    policy = told.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        advice = "set maxmemory-policy noeviction: a stream that is evicted is history lost"
        return _Finding("warn", f"{text} may evict the stream ({policy})", advice)
    return _Finding("ok", text)


async def _hub(url: str) -> None:
    from safe_broadcaster.demo.subscriber import connect  # noqa: PLC0415 - only here

    _, writer = await asyncio.wait_for(connect(url), _PATIENCE)
    writer.close()
