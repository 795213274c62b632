"""The processes that are killed. Each is killed by its own pid, and ends by itself if this one does."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chaos.engine import Orders

__all__ = ["Broken", "EngineProcess", "HubProcess", "RedisProcess", "free_port"]

HOST = "127.0.0.1"
BOOT_TIMEOUT = 20.0
END_TIMEOUT = 20.0
_POLL = 0.01
_REPLAY = ("--replay-events", "50000", "--replay-bytes", str(64 << 20))
"""More than a subscriber misses in one absence, and little enough to be read at every start."""


def free_port() -> int:
    """A port that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Broken(Exception):
    """A process did what it never may; the message says what."""


class _Process:
    def __init__(self, name: str, errors: Path) -> None:
        self.name = name
        self._errors = errors
        self._process: asyncio.subprocess.Process | None = None

    async def _spawn(self, *command: str, stdout: int = subprocess.DEVNULL) -> asyncio.subprocess.Process:
        with self._errors.open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.PIPE, stdout=stdout, stderr=errors, start_new_session=True,
            )  # fmt: skip
        return self._process

    @property
    def process(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise Broken(f"{self.name} was not started")
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def signal(self, number: int) -> bool:
        """Signal it; False if it has ended by itself before."""
        if not self.running:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
            return True
        return False

    async def end(self) -> None:
        """Wait for its end.

        Raises:
            Broken: It does not end.
        """
        try:
            await asyncio.wait_for(self.process.wait(), END_TIMEOUT)
        except asyncio.TimeoutError:
            self.signal(signal.SIGKILL)
            await self.process.wait()
            raise Broken(f"{self.name} did not end within {END_TIMEOUT:.0f} s") from None

    async def discard(self) -> None:
        """Make an end of it, whatever it does."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            await self._process.wait()

    def complaint(self) -> str:
        """What it wrote to its standard error."""
        return self._errors.read_text(errors="replace").strip() if self._errors.exists() else ""


class _Server(_Process):
    """Listens on a fixed port."""

    def __init__(self, name: str, errors: Path, port: int) -> None:
        super().__init__(name, errors)
        self.port = port

    async def answers(self) -> None:
        """Wait until its port answers.

        Raises:
            Broken: It ended, or does not answer in time.
        """
        deadline = asyncio.get_running_loop().time() + BOOT_TIMEOUT
        while asyncio.get_running_loop().time() < deadline:
            if not self.running:
                raise Broken(f"{self.name} ended: {self.complaint()}")
            with suppress(OSError):
                _, writer = await asyncio.open_connection(HOST, self.port)
                writer.close()
                return
            await asyncio.sleep(_POLL)
        raise Broken(f"{self.name} does not answer within {BOOT_TIMEOUT:.0f} s")


class HubProcess(_Server):
    """``safe-broadcaster serve`` on a fixed port."""

    def __init__(self, name: str, folder: Path, port: int, *options: str) -> None:
        super().__init__(name, folder / f"{name}.err", port)
        self._options = options

    async def start(self) -> None:
        """Start it; it does not answer yet."""
        where = ("--host", HOST, "--port", str(self.port), "--stop-on-eof")
        await self._spawn(sys.executable, "-m", "safe_broadcaster", "serve", *where, *self._options, *_REPLAY)

    async def stats(self) -> dict[str, Any]:
        """Its numbers."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        writer.write(b"GET /stats HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return orjson.loads(answer.partition(b"\r\n\r\n")[2])


class RedisProcess(_Server):
    """``redis-server``: writes down what it has done before it answers, so that a kill loses nothing, or forgets."""

    def __init__(self, folder: Path, port: int, *, durable: bool) -> None:
        super().__init__("redis", folder / "redis.err", port)
        self._folder = folder
        self._appends = "yes" if durable else "no"

    async def start(self) -> None:
        """Start it; it does not answer yet."""
        where = ("--bind", HOST, "--port", str(self.port), "--dir", str(self._folder))
        await self._spawn("redis-server", *where, "--appendonly", self._appends, "--save", "", "--loglevel", "warning")

    async def say(self, command: str) -> str:
        """Its answer to a command without an argument that has spaces."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            writer.write(command.encode() + b"\r\n")
            return (await asyncio.wait_for(reader.readline(), END_TIMEOUT)).decode().strip()
        finally:
            writer.close()
            with suppress(OSError):  # it may be killed meanwhile
                await writer.wait_closed()


class EngineProcess(_Process):
    """One life of an engine; started ahead of its time."""

    def __init__(self, name: str, errors: Path) -> None:
        super().__init__(name, errors)
        self._reading: asyncio.Task[None] | None = None
        self.stopping = asyncio.Event()
        """Set when it begins to stop, and at its end."""
        self.opened = False
        """Whether it said that its spill was open."""
        self.stats: dict[str, Any] | None = None
        """What it told last, if it stopped in order."""

    async def start(self) -> None:
        """Start it; it waits for orders."""
        await self._spawn(sys.executable, "-m", "chaos.engine", stdout=subprocess.PIPE)

    def order(self, orders: Orders, on_returned: Callable[[int], None]) -> None:
        """Let it begin; ``on_returned`` is called with each number that it tells."""
        self._reading = asyncio.create_task(self._read(on_returned))
        if self.process.stdin is not None:
            self.process.stdin.write(orjson.dumps(orders) + b"\n")

    async def heard(self) -> None:
        """Wait until the pipe is read to its end: what was written before the kill counts."""
        if self._reading is not None:
            await self._reading
        await self.process.wait()

    async def _read(self, on_returned: Callable[[int], None]) -> None:
        if self.process.stdout is None:
            return
        async for line in self.process.stdout:
            if line.startswith(b"stopped "):
                self.stats = orjson.loads(line[8:])
            elif line == b"opened\n":
                self.opened = True
            elif line == b"stopping\n":
                self.stopping.set()
            else:
                on_returned(int(line))
        self.stopping.set()
