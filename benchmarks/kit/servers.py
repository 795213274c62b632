"""Servers that are peers or neighbours: started here, on ports of their own, and ended with us, however we end."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


class UnavailableError(Exception):
    """Says what is missing here."""


@contextmanager
def server(name: str, *options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A server for the time of the block; it ends with us, however we end."""
    if shutil.which(name) is None:
        raise UnavailableError(f"{name} is not installed")
    command = ["setpriv", "--pdeathsig", "TERM", name, *map(str, options)]
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        yield child
    finally:
        child.terminate()
        child.wait(10)


async def listening(port: int, timeout: float = 10) -> None:
    """Waits until somebody accepts connections there."""
    end = asyncio.get_running_loop().time() + timeout
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:  # noqa: PERF203 it waits anyhow
            if asyncio.get_running_loop().time() > end:
                raise
            await asyncio.sleep(0.01)
        else:
            writer.close()
            await writer.wait_closed()
            return
