"""The processes of the demo: the hub, which is killed and started again, and the engines."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson

from safe_broadcaster.demo.verdict import EngineReport

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DemoError", "EngineProcess", "HubProcess", "choose_port"]

HOST = "127.0.0.1"
FAVOURITE_PORT = 8000
REPLAY = ("--replay-events", "200000", "--replay-bytes", str(256 << 20))
"""Room for all that three engines spill during an outage, for a subscriber that comes back a little later than they."""

BOOT_TIMEOUT = 20.0
END_TIMEOUT = 5.0


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why in one line."""


def choose_port(wanted: int | None) -> int:
    """The wanted port; without a wish 8000 where that is free, else any.

    Raises:
        DemoError: The wanted port is in use.
    """
    for port in (FAVOURITE_PORT, 0) if wanted is None else (wanted,):
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((HOST, port))
                return int(probe.getsockname()[1])
    raise DemoError(f"port {wanted} is in use: choose another by --port")


class _Process:
    """A child in a session of its own (Ctrl-C reaches only the parent) that ends when its standard input does."""

    def __init__(self, name: str, folder: Path, *command: str) -> None:
        self.name = name
        self._command = (sys.executable, "-m", *command)
        self._errors = folder / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, *, stdout: int = subprocess.DEVNULL) -> asyncio.subprocess.Process:
        with self._errors.open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=errors,
                start_new_session=True,
            )
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def why(self) -> str:
        """The last line that it wrote to its standard error."""
        lines = self._errors.read_text(errors="replace").strip().splitlines() if self._errors.exists() else []
        return lines[-1] if lines else "it said nothing"

    def close_input(self) -> None:
        """Asks it to end."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def send_signal(self, number: int) -> None:
        """Signals it while it runs; by its own pid only."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def end(self) -> None:
        """Ends it, kindly at first, and waits until it is gone."""
        if self._process is None:
            return
        self.close_input()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.send_signal(number)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), END_TIMEOUT)
                return


class HubProcess(_Process):
    """``safe-broadcaster serve`` on a fixed port."""

    def __init__(self, folder: Path, port: int) -> None:
        where = ("--host", HOST, "--port", str(port), "--stop-on-eof")
        log = ("--log", str(folder / "hub.db"), *REPLAY)
        super().__init__("hub", folder, "safe_broadcaster", "serve", *where, *log)
        self.port = port
        self.url = f"ws://{HOST}:{port}/ws"
        self.page = f"http://{HOST}:{port}/"

    async def boot(self) -> None:
        """Starts it and waits until its port answers.

        Raises:
            DemoError: It ended, or does not answer in time.
        """
        await self.start()
        deadline = monotonic() + BOOT_TIMEOUT
        while monotonic() < deadline:
            if not self.running:
                raise DemoError(f"the hub did not start: {self.why()}")
            with suppress(OSError):
                _, writer = await asyncio.open_connection(HOST, self.port)
                writer.close()
                return
            await asyncio.sleep(0.02)
        raise DemoError(f"the hub does not answer on port {self.port} after {BOOT_TIMEOUT:.0f} s")

    async def kill(self) -> None:
        """SIGKILL: no chance to say or store anything."""
        self.send_signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()


class EngineProcess(_Process):
    """One engine, and what it said last."""

    def __init__(self, folder: Path, citizen: str, url: str, *, part: str, rate: float) -> None:
        options = ("--url", url, "--spill", str(folder / f"{citizen}.db"), "--citizen", citizen)
        pace = ("--part", part, "--rate", str(rate))
        super().__init__(citizen, folder, "safe_broadcaster.demo.engine", *options, *pace)
        self.ready = asyncio.Event()
        """Set when it emits, and when it ended before it came to that."""
        self.ended = asyncio.Event()
        """Set when it is gone and all that it said was heard."""
        self.emitted = 0
        self.spill = 0
        self.report: EngineReport | None = None

    async def follow(self) -> None:
        """Starts it and reads what it says, until it ends."""
        process = await self.start(stdout=subprocess.PIPE)
        if process.stdout is not None:
            async for line in process.stdout:
                self._hear(orjson.loads(line))
        await process.wait()
        self.ready.set()
        self.ended.set()

    def _hear(self, said: dict[str, Any]) -> None:
        match said:
            case {"state": "ready"}:
                self.ready.set()
            case {"state": "running", "n": int(n), "spill": int(spill)}:
                self.emitted, self.spill = n, spill
            case {"state": "ended", "report": dict()}:
                self.report = EngineReport(**said["report"])
                self.emitted, self.spill = self.report.emitted, 0
            case _:
                pass
