"""A real ``redis-server`` on a free port of loopback, for the tests of the bridge."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MISSING = "there is no redis-server on this machine: `apt-get install redis-server` brings it"


def is_there() -> bool:
    return shutil.which("redis-server") is not None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """Keeps nothing on disk unless told to; the same port after a restart. With a ``config`` it is a sentinel.

    With ``tls``, a certificate and its key, the port speaks TLS alone.
    """

    def __init__(
        self, place: Path, *options: str, config: Path | None = None, tls: tuple[Path, Path] | None = None
    ) -> None:
        self.port = free_port()
        self._tls = tls
        self._sentinel = config
        self._place = place
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._place)]
        if self._sentinel is None:
            command = ["redis-server", *where, "--save", "", "--appendonly", "no", *self._options]
            if self._tls is not None:
                cert, key = map(str, self._tls)
                command += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
                command += ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert]
        else:
            command = ["redis-server", str(self._sentinel), *where, "--sentinel"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.monotonic() < deadline, "redis-server does not listen"
            time.sleep(0.01)

    def stop(self) -> None:
        """Kill it: what it did not write is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def command(self, *words: str) -> str:
        """Send a command as a person would; returns what came back, as text."""
        command = ["redis-cli", "-p", str(self.port), *words]
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=20).stdout.strip()
