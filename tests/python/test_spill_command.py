"""``safe-broadcaster spill``: what people find out about a spill, from another process, while its owner runs or not."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import EventBroadcaster, SafeBroadcaster, SpillLocked, _core
from support import NOWHERE, event, eventually, numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., SafeBroadcaster]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safe_broadcaster", "spill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


async def spill(*arguments: object) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(run, *arguments)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def stored(broadcaster: SafeBroadcaster, count: int) -> None:
    """Wait until so many events are in the file and not only in memory."""
    await eventually(lambda: broadcaster.get_stats()["outbox_bytes"] == 0 and len(broadcaster.spill) == count)


@pytest.fixture
async def left(make: Make, spill_path: Path) -> Path:
    """The spill of a broadcaster that has ended: event 1 parked, 2 to 4 waiting."""
    async with EventBroadcaster(port=0) as hub:
        broadcaster = make(hub.url, spill_path)
        await broadcaster.start(5)
        await broadcaster.safe_emit({"type": 1, "content": {"n": 1}})
        assert await broadcaster.drain(10)
        await broadcaster.stop()
    broadcaster = make(NOWHERE, spill_path)
    for n in (2, 3, 4):
        await broadcaster.safe_emit(event(n))
    await stored(broadcaster, 3)
    await broadcaster.stop(0)
    return spill_path


async def test_a_spill_is_shown_while_its_owner_runs(make: Make) -> None:
    broadcaster = make(NOWHERE, emitter_id="ada")
    for n in range(5):
        await broadcaster.safe_emit(event(n))
    await stored(broadcaster, 5)
    shown = await spill("show", broadcaster.spill_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"owner      process {os.getpid()}\n" in shown.stdout
    assert "emitter    ada, epoch" in shown.stdout
    summary = json.loads((await spill("show", broadcaster.spill_path, "--json")).stdout)
    assert (summary["owner"], summary["events"], summary["last_seq"]) == (os.getpid(), 5, 5)
    assert summary["oldest_age"] >= 0
    assert (await spill("verify", broadcaster.spill_path)).stdout == "ok\n"
    assert numbers(lines((await spill("export", broadcaster.spill_path)).stdout)) == list(range(5))
    await broadcaster.safe_emit(event(5))  # the owner goes on unharmed
    await stored(broadcaster, 6)
    assert not broadcaster.get_stats()["degraded"]


async def test_the_owning_process_itself_is_sent_to_its_broadcaster(make: Make) -> None:
    broadcaster = make(NOWHERE)
    await broadcaster.safe_emit(event(1))
    await stored(broadcaster, 1)
    with pytest.raises(SpillLocked, match="owned by this very process"):
        _core.spill_show(broadcaster.spill_path)
    await broadcaster.stop(0)
    assert json.loads(_core.spill_show(broadcaster.spill_path))["owner"] is None


async def test_what_waits_and_what_is_parked_is_shown_and_exported(left: Path, tmp_path: Path) -> None:
    shown = await spill("show", left)
    assert "owner      none is running\n" in shown.stdout
    assert "parked     1\n" in shown.stdout
    assert "expected a string" in shown.stdout
    assert numbers(lines((await spill("export", left)).stdout)) == [2, 3, 4]
    file = tmp_path / "parked.jsonl"
    assert (await spill("export", left, "--parked", "-o", file)).stdout == ""
    assert lines(file.read_text()) == [{"type": 1, "content": {"n": 1}}]
    assert (await spill("verify", left)).stdout == "ok\n"


async def test_an_export_is_read_in_parts(make: Make) -> None:
    broadcaster = make(NOWHERE, spill_max_bytes=64 << 20)
    for n in range(40):
        await broadcaster.safe_emit(event(n, pad="x" * 100_000))
    await stored(broadcaster, 40)
    exported = await spill("export", broadcaster.spill_path)
    assert numbers(lines(exported.stdout)) == list(range(40))


async def test_requeue_marks_what_is_parked_and_refuses_what_is_not(left: Path) -> None:
    wrong = await spill("requeue", left, 1, 99)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "no event with seq 99 is parked" in wrong.stderr
    assert not json.loads((await spill("show", left, "--json")).stdout)["parked"][0]["wanted"]
    assert (await spill("requeue", left, 1)).returncode == 0
    assert json.loads((await spill("show", left, "--json")).stdout)["parked"][0]["wanted"]
    assert (await spill("requeue", left)).returncode == 2
    assert (await spill("requeue", left, 1, "--all")).returncode == 2


async def test_findings_are_told_one_a_line_and_with_exit_code_1(left: Path) -> None:
    with sqlite3.connect(left) as db:  # its owner has ended
        db.execute("UPDATE item SET data = x'01' WHERE first = (SELECT max(first) FROM item)")
    db.close()
    found = await spill("verify", left)
    assert (found.returncode, found.stdout.count("\n")) == (1, 2)  # its checksum, and its block
    assert "is no block" in found.stdout


@pytest.mark.parametrize("action", ["show", "verify", "export", "requeue"])
async def test_what_is_no_spill_is_one_line_with_path_and_remedy(tmp_path: Path, action: str) -> None:
    more = ["--all"] if action == "requeue" else []
    notes, missing, torn = tmp_path / "notes.txt", tmp_path / "missing.db", tmp_path / "torn.db"
    notes.write_text("no database at all, only words " * 100)
    torn.write_bytes(b"SQLite format 3\0" + b"\xff" * 4080)
    for path, word in (
        (notes, "check the path"),
        (missing, "no such file; give the"),
        (torn, str(torn)),
        (tmp_path, "directory"),
    ):
        ended = await spill(action, path, *more)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
        assert str(path) in ended.stderr
        assert word in ended.stderr
    assert not missing.exists()
