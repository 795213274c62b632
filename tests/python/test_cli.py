"""The command line, run as its users run it."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import safe_broadcaster
from safe_broadcaster.cli import build_parser
from safe_broadcaster.dashboard import page

if TYPE_CHECKING:
    from collections.abc import Iterator

GOLDEN = Path(__file__).parent / "golden" / "help.txt"
COMMAND = [sys.executable, "-m", "safe_broadcaster"]
NOBODY = "ws://127.0.0.1:9/ws"


def run(*arguments: str, stdin: str | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, input=stdin or "", capture_output=True, text=True, timeout=50, check=False, cwd=cwd)


@pytest.fixture
def hub() -> Iterator[str]:
    with subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--stop-on-eof"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        yield url
        process.stdin.close()
        assert process.wait(20) == 0


def helps(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return "\n\n".join(each.format_help().rstrip() for each in parsers(build_parser())) + "\n"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)


def test_help_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a wanted change: ``UPDATE_GOLDEN=1 pytest tests/python/test_cli.py``, and read the difference."""
    text = helps(monkeypatch)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_version() -> None:
    assert run("--version").stdout == f"safe-broadcaster {safe_broadcaster.__version__}\n"


@pytest.mark.parametrize("wrong", [(), ("nonsense",), ("demo", "--seconds", "0"), ("serve", "--port", "x")])
def test_a_wrong_command_line_is_2(wrong: tuple[str, ...]) -> None:
    ended = run(*wrong)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "usage: safe-broadcaster" in ended.stderr


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for command in ("serve", "demo"):
            ended = run(command, "--port", port)
            assert ended.returncode == 1
            assert ended.stderr.count("\n") == 1
            assert port in ended.stderr


def test_what_is_emitted_is_heard(hub: str, tmp_path: Path) -> None:
    events = [{"type": "alert.disk", "content": {"n": n}} for n in range(50)]
    tail = [*COMMAND, "tail", "alert.*", "--url", hub, "--count", "51"]
    with subprocess.Popen(tail, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        first = {"type": "alert.first"}
        heard = ""
        while not heard:  # until the listener is there
            assert run("emit", json.dumps(first), "--url", hub, cwd=tmp_path).returncode == 0
            os.set_blocking(listener.stdout.fileno(), False)
            heard = listener.stdout.readline()
        os.set_blocking(listener.stdout.fileno(), True)
        lines = "".join(json.dumps(event) + "\n" for event in events)
        ended = run("emit", "--url", hub, "--spill", str(tmp_path / "s.db"), stdin="\n" + lines.rstrip())
        assert (ended.returncode, ended.stderr) == (0, "")
        got = [json.loads(line) for line in [heard, *listener.stdout]]
        assert listener.wait(20) == 0
    assert [event for event in got if event != first] == events[: 51 - got.count(first)]


def test_what_cannot_be_delivered_waits_in_the_spill(hub: str, tmp_path: Path) -> None:
    spill = str(tmp_path / "s.db")
    ended = run("emit", '{"type": "a"}', "--url", NOBODY, "--spill", spill, "--timeout", "0.5")
    assert ended.returncode == 1
    assert "waits in the spill" in ended.stderr
    assert ended.stderr.count("\n") == 1
    ended = run("emit", '{"type": "b"}', "--url", hub, "--spill", spill)
    assert (ended.returncode, ended.stderr) == (0, "")
    stats = hub.replace("ws://", "http://").replace("/ws", "/stats")
    with urllib.request.urlopen(stats) as answer:
        assert json.load(answer)["offset"] == 2, "the first came too"


def test_an_event_that_is_none_is_refused_and_the_others_go_out(hub: str, tmp_path: Path) -> None:
    ended = run("emit", "--url", hub, stdin='{"type": "a"}\nnot json\n[1]\n{"type": "b"}\n', cwd=tmp_path)
    assert ended.returncode == 1
    assert "event 2 was refused" in ended.stderr
    assert "event 3 was refused" in ended.stderr
    assert ended.stderr.count("\n") == 2


def test_doctor(hub: str, tmp_path: Path) -> None:
    well = run("doctor", "--url", hub, cwd=tmp_path)
    assert (well.returncode, well.stdout.count("ok    ")) == (0, 2), well.stdout + well.stderr
    ill = run("doctor", "--url", NOBODY, cwd=tmp_path)
    assert ill.returncode == 1
    assert f"FAIL  {NOBODY}" in ill.stdout
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_the_page_loads_nothing_from_elsewhere() -> None:
    html = page()
    assert "<!doctype html>" in html
    for elsewhere in ("http://", "https://", "//cdn", "@import", " src=", "innerHTML"):
        assert elsewhere not in html.replace('"https:"', ""), elsewhere
