"""What the page on the command line shows is what a new user gets who types it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from redis_server import free_port
from safe_broadcaster.cli.app import app
from test_docs import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = "docs/cli.md"


def commands(port: int) -> Iterator[tuple[str, list[str]]]:
    """Each command, and the lines that it prints; the page's port is replaced by a free one."""
    text = (ROOT / PAGE).read_text().replace("8000", str(port))
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.splitlines()
            yield command, lines


def pattern(line: str) -> str:
    """A line of the page, in which … stands for anything."""
    return ".*".join(re.escape(part) for part in line.split("…"))


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has just installed it; the default address is that of no other hub."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "safe-broadcaster"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m safe_broadcaster "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_every_command_of_the_page_prints_what_it_shows(shell: dict[str, str], tmp_path: Path) -> None:
    port, home = free_port(), tmp_path / "home"
    home.mkdir()
    hub: subprocess.Popen[str] | None = None
    try:
        for command, wanted in commands(port):
            if command.endswith(" &"):
                hub = subprocess.Popen(
                    ["sh", "-c", f"exec {command[:-2]} --stop-on-eof"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=shell,
                    cwd=home,
                )
                assert hub.stdout is not None
                assert [hub.stdout.readline().rstrip("\n") for _ in wanted] == wanted
                continue
            where = "" if "--url" in command else f" --url ws://127.0.0.1:{port}/ws"
            typed = re.sub(r"(safe-broadcaster (?:emit|tail))", rf"\1{where}", command)
            ended = subprocess.run(
                ["bash", "-c", typed],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=40,
                check=False,
                env=shell,
                cwd=home,
            )
            got = ended.stdout.splitlines()
            assert len(got) == len(wanted), (command, ended.stdout)
            for line, like in zip(got, wanted, strict=True):
                assert re.fullmatch(pattern(like), line), (command, line, like)
    finally:
        if hub is not None and hub.stdin is not None and hub.stdout is not None:
            hub.stdin.close()
            hub.wait(20)
            hub.stdout.close()
    assert hub is not None
    assert hub.returncode == 0


def test_every_command_is_on_the_page() -> None:
    text = (ROOT / PAGE).read_text()
    assert [each for each in app.commands if f"safe-broadcaster {each}" not in text] == []
