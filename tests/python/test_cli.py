"""The command line, run as its users run it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

import safe_broadcaster
from safe_broadcaster.cli.app import app
from safe_broadcaster.cli.common import CommandError, lines
from safe_broadcaster.cli.doctor import _redis
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


def helps(command: click.Command, parent: click.Context | None = None) -> Iterator[str]:
    """A command's, and those of its own commands."""
    context = click.Context(command, info_name="safe-broadcaster" if parent is None else command.name, parent=parent)
    context.terminal_width = 100
    yield command.get_help(context)
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from helps(each, context)


def test_help_is_what_it_was() -> None:
    """After a wanted change: ``UPDATE_GOLDEN=1 pytest tests/python/test_cli.py``, and read the difference."""
    text = "\n\n".join(helps(app)) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_version() -> None:
    assert run("--version").stdout == f"safe-broadcaster {safe_broadcaster.__version__}\n"


@pytest.mark.parametrize("wrong", [(), ("nonsense",), ("demo", "--seconds", "0"), ("serve", "--port", "x")])
def test_a_wrong_command_line_is_2(wrong: tuple[str, ...]) -> None:
    ended = run(*wrong)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Usage: safe-broadcaster" in ended.stderr


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
    tail = [*COMMAND, "tail", "--match", "alert.*", "--url", hub, "--count", "51"]
    with subprocess.Popen(tail, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        first = {"type": "alert.first"}
        heard = ""
        while not heard:  # until the listener is there
            assert run("emit", json.dumps(first), "--url", hub, cwd=tmp_path).returncode == 0
            os.set_blocking(listener.stdout.fileno(), False)
            heard = listener.stdout.readline()
        os.set_blocking(listener.stdout.fileno(), True)
        text = "".join(json.dumps(event) + "\n" for event in events)
        ended = run("emit", "--url", hub, "--spill", str(tmp_path / "s.db"), stdin="\n" + text.rstrip())
        assert (ended.returncode, ended.stderr) == (0, "")
        got = [json.loads(line) for line in [heard, *listener.stdout]]
        assert listener.wait(20) == 0
    assert [event for event in got if event != first] == events[: 51 - got.count(first)]


def test_what_cannot_be_delivered_waits_in_the_spill(hub: str, tmp_path: Path) -> None:
    spill = str(tmp_path / "s.db")
    ended = run("emit", '{"type": "a"}', "--url", NOBODY, "--spill", spill, "--timeout", "0.5")
    assert ended.returncode == 3
    assert "waits in the spill" in ended.stderr
    assert ended.stderr.count("\n") == 1
    ended = run("emit", '{"type": "b"}', "--url", hub, "--spill", spill)
    assert (ended.returncode, ended.stderr) == (0, "")
    stats = hub.replace("ws://", "http://").replace("/ws", "/stats")
    with urllib.request.urlopen(stats) as answer:
        assert json.load(answer)["offset"] == 2, "the first came too"


def test_an_event_that_is_none_is_refused_and_the_others_go_out(hub: str, tmp_path: Path) -> None:
    text = '{"type": "a"}\n\nnot json\n[1]\n{"type": "b"}\n'
    ended = run("emit", "--keep-going", "--json", "--url", hub, stdin=text, cwd=tmp_path)
    assert ended.returncode == 1
    assert "line 3 was refused" in ended.stderr
    assert "line 4 was refused" in ended.stderr
    assert ended.stderr.count("\n") == 2
    outcome = json.loads(ended.stdout)
    assert (outcome["accepted"], outcome["refused"], outcome["delivered"]) == (2, 2, True)


def test_without_keep_going_the_first_that_is_none_ends_it_and_those_before_are_delivered(
    hub: str, tmp_path: Path
) -> None:
    (tmp_path / "events").write_text('{"type": "a"}\nnot json\n{"type": "b"}\n')
    ended = run("emit", "--file", "events", "--json", "--url", hub, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[0].startswith("safe-broadcaster emit: line 2 was refused")
    outcome = json.loads(ended.stdout)
    assert (outcome["accepted"], outcome["refused"], outcome["delivered"]) == (1, 1, True)


def test_lines_of_any_length_come_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [(1, b"x" * 200_000), (3, b"y"), (5, b"z" * 65_536), (6, b"end")]
    path = tmp_path / "lines"
    path.write_bytes(b"\n".join([wanted[0][1], b"", b"y", b" ", wanted[2][1], b"end"]))

    async def read() -> list[tuple[int, bytes]]:
        with path.open("rb") as file:
            return [each async for each in lines(file.fileno())]

    assert asyncio.run(read()) == wanted
    path.write_bytes(b"a\n" + b"x" * 70_000)
    monkeypatch.setattr("safe_broadcaster.cli.common._LONGEST_LINE", 66_000)
    with pytest.raises(CommandError, match="line 2 is longer than"):
        asyncio.run(read())


def test_ctrl_c_ends_an_emit_that_waits_for_its_next_line(hub: str, tmp_path: Path) -> None:
    spill = str(tmp_path / "s.db")
    emit = [*COMMAND, "emit", "--url", hub, "--spill", spill]
    with subprocess.Popen(emit, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write('{"type": "a"}\n')
        process.stdin.flush()
        heard = run("tail", "--all", "--count", "1", "--url", hub)
        assert heard.stdout == '{"type":"a"}\n'
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert process.stderr.read().strip() == ""


def test_an_emit_to_a_terminal_shows_how_far_it_is(hub: str, tmp_path: Path) -> None:
    (tmp_path / "events").write_text('{"type": "a"}\n' * 20_000)
    ours, theirs = pty.openpty()
    emit = [*COMMAND, "emit", "--file", "events", "--url", hub]
    with subprocess.Popen(emit, cwd=tmp_path, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while data := os.read(ours, 4096):
                shown += data
        os.close(ours)
        assert process.wait(20) == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown)
    assert re.search(rb"[0-9,]+ events .*[0-9]+%", text), text
    assert b"refused" not in text


def test_a_tail_goes_on_where_the_last_one_ended_also_over_a_restart_of_the_hub(tmp_path: Path) -> None:
    serve = [*COMMAND, "serve", "--port", "0", "--stop-on-eof", "--log", str(tmp_path / "log.db")]
    place = str(tmp_path / "place")
    got: list[int] = []
    for life in range(2):
        with subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            url = process.stdout.readline().split()[1]
            text = "".join(json.dumps({"type": "a", "n": 10 * life + n}) + "\n" for n in range(10))
            assert run("emit", "--url", url, stdin=text, cwd=tmp_path).returncode == 0
            for count in (3, 4):
                start = ["--all"] if not got else []
                heard = run("tail", *start, "--url", url, "--count", str(count), "--resume", place)
                assert (heard.returncode, heard.stderr) == (0, "")
                got += [json.loads(line)["n"] for line in heard.stdout.splitlines()]
            process.stdin.close()
            assert process.wait(20) == 0
    assert got == list(range(14))


def test_a_tail_for_people_shows_no_control_characters(hub: str, tmp_path: Path) -> None:
    event = {"type": "a\x1b[31m", "topic": "b/c", "n": "\u202e"}
    assert run("emit", json.dumps(event), "--url", hub, cwd=tmp_path).returncode == 0
    heard = run("tail", "--all", "--count", "1", "--pretty", "--url", hub).stdout
    assert heard[8:] == '  a\\x1b[31m  b/c  {"n":"\\u202e"}\n'


def test_a_place_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "place").write_text("{}")
    ended = run("tail", "--resume", "place", cwd=tmp_path)
    assert ended.returncode == 1
    assert "place holds no position" in ended.stderr


def test_doctor_tells_what_is_well_what_is_not_and_what_to_do(hub: str, tmp_path: Path) -> None:
    well = run("doctor", "--url", hub, "--port", "0", cwd=tmp_path)
    assert well.returncode == 0, well.stdout + well.stderr
    assert f"ok    {hub}" in well.stdout
    assert f"ok    a spill in {tmp_path}" in well.stdout
    taken = hub.rpartition(":")[2].partition("/")[0]
    ill = run("doctor", "--url", NOBODY, "--port", taken, "--redis", "redis://:secret@127.0.0.1:9/0", cwd=tmp_path)
    assert ill.returncode == 1
    assert f"FAIL  {NOBODY}" in ill.stdout
    assert "FAIL  Redis: " in ill.stdout
    assert f"warn  port {taken} cannot be had" in ill.stdout
    assert ill.stdout.count("      → ") >= 3
    assert "secret" not in ill.stdout + ill.stderr
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_doctor_as_json(tmp_path: Path) -> None:
    ended = run("doctor", "--json", "--port", "0", "--folder", str(tmp_path / "none"))
    assert ended.returncode == 1
    told = json.loads(ended.stdout)
    assert told["versions"]["safe-broadcaster"] == safe_broadcaster.__version__
    states = {finding["what"].split(" ")[0]: finding["state"] for finding in told["findings"]}
    assert (states["a"], states["port"]) == ("FAIL", "ok")


def bulk(text: str) -> bytes:
    """A text as Redis sends it."""
    return b"$%d\r\n%s\r\n" % (len(text), text.encode())


REDIS_SAYS = [
    (b"+PONG\r\n", "ok", "Redis unknown"),
    (bulk("# Server\r\nredis_version:7.0.1\r\nmaxmemory_policy:noeviction\r\n"), "ok", "Redis 7.0.1"),
    (bulk("redis_version:7.0.1\r\nmaxmemory_policy:allkeys-lfu\r\n"), "warn", "may evict the stream"),
    (bulk("redis_version:5.0.14\r\n"), "FAIL", "Redis 5.0.14"),
    (b"-NOAUTH Authentication required.\r\n", "FAIL", "NOAUTH"),
    (b"HTTP/1.1 400 Bad Request\r\n", "FAIL", "what answers there is no Redis"),
    (b"", "FAIL", "Redis: "),
]


@pytest.mark.parametrize(("answer", "state", "words"), REDIS_SAYS, ids=lambda each: str(each)[:20])
async def test_doctor_understands_what_a_redis_says(answer: bytes, state: str, words: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"INFO\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        finding = await _redis(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
    assert finding.state == state
    assert words in finding.what


def test_bench_as_json() -> None:
    ended = run("bench", "--events", "500", "--bytes", "300", "--json")
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    assert (figures["events"], figures["bytes"]) == (500, 300)
    assert all(figures[name] > 0 for name in ("dumps_us", "call_us", "confirmed_per_s", "latency_p50_ms"))


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["spill", "sh"], {"show"}),
        (["spill", "show", "--j"], {"--json"}),
        (["te"], set()),
        (["ta"], {"tail"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
    ],
)
def test_a_shell_completes_commands_and_options(typed: list[str], wanted: set[str]) -> None:
    script = run("completion", "bash").stdout
    assert "_SAFE_BROADCASTER_COMPLETE=bash_complete" in script
    line = " ".join(["safe-broadcaster", *typed])
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(typed)), "_SAFE_BROADCASTER_COMPLETE": "bash_complete"}
    ended = subprocess.run(COMMAND, capture_output=True, text=True, check=False, env={**os.environ, **asked})
    assert {each.partition(",")[2] for each in ended.stdout.split()} == wanted, ended.stderr


def test_other_shells_have_their_scripts_too() -> None:
    assert "compdef" in run("completion", "zsh").stdout
    assert "complete --no-files --command safe-broadcaster" in run("completion", "fish").stdout


def test_without_click_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['click'] = None; from safe_broadcaster.cli import main; sys.exit(main(['demo']))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "pip install 'safe-broadcaster[cli]'" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_page_loads_nothing_from_elsewhere() -> None:
    html = page()
    assert "<!doctype html>" in html
    for elsewhere in ("http://", "https://", "//cdn", "@import", " src=", "innerHTML"):
        assert elsewhere not in html.replace('"https:"', ""), elsewhere
