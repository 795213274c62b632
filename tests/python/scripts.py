"""Scripts that run in a process of their own, because they end it, or are killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safe_broadcaster import SafeBroadcaster, SpillLocked
from support import NOWHERE, event, numbers

if TYPE_CHECKING:
    from collections.abc import Iterator

PRELUDE = """
import asyncio, os, signal, sys, threading, time
from support import *
from safe_broadcaster import *
path = sys.argv[1]
def say(*words): print(*words, flush=True)
def tell(n): os.write(1, b"%d\\n" % n)  # unbuffered: it outlives a kill
"""


def spawn(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a script in a process of its own."""
    code = PRELUDE + textwrap.dedent(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def run(script: str, *arguments: object, timeout: float = 20) -> tuple[int, list[str], str]:
    """The exit code, the lines and the standard error of a script."""
    process = spawn(script, *arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"hangs: {out!r} {err!r}")
    return process.returncode, out.splitlines(), err


def told(lines: list[str]) -> set[int]:
    """The numbers that a script has told."""
    return {int(line) for line in lines if line.isdigit()}


@contextlib.contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a script that is killed in the end, if it still lives then."""
    process = spawn(script, *arguments)
    assert process.stdout
    assert process.stderr
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def second_process(path: str, owner: int) -> None:
    """What a child of multiprocessing does: it is refused its parent's spill, and uses one of its own."""
    other = SafeBroadcaster(NOWHERE, path)
    try:
        asyncio.run(other.start(5))
    except SpillLocked as error:
        assert f"process {owner};" in str(error)  # noqa: PT017 - a child has no pytest
    else:
        raise AssertionError("two processes own one file")
    own = SafeBroadcaster(NOWHERE, path + ".child")
    own.emit_nowait(event(1))
    assert numbers(list(own.spill)) == [1]
    own._stop_blocking(0)
