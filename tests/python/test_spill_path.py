"""A spill path that cannot be used: a clear error at ``start()`` that names the path and the remedy."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safe_broadcaster import BroadcastError, SafeBroadcaster, SpillCorrupt, SpillLocked
from support import NOWHERE, PlainServer, event, eventually, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., SafeBroadcaster]


async def refused(make: Make, path: Path) -> BroadcastError:
    broadcaster = make(NOWHERE, path)
    with pytest.raises(BroadcastError) as caught:
        await broadcaster.start(5)
    assert str(path) in str(caught.value)
    assert broadcaster.get_stats()["last_error"] == str(caught.value)
    await broadcaster.stop()
    return caught.value


async def test_a_missing_directory_is_told(make: Make, tmp_path: Path) -> None:
    error = await refused(make, tmp_path / "missing" / "spill.db")
    assert isinstance(error, SpillCorrupt)
    assert isinstance(error, OSError)
    assert "its directory does not exist; create it, or choose another path" in str(error)
    assert not (tmp_path / "missing").exists()


async def test_a_directory_is_told(make: Make, tmp_path: Path) -> None:
    error = await refused(make, tmp_path)
    assert isinstance(error, SpillCorrupt)
    assert "is a directory; give the path of a file in it" in str(error)


async def test_a_read_only_place_is_told(make: Make, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        place = Path("/proc/self/spill.db")  # not even root can write here
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        place = tmp_path / "closed" / "spill.db"
    error = await refused(make, place)
    assert isinstance(error, SpillCorrupt)
    assert "make the directory writable, or choose another path" in str(error)


@pytest.mark.parametrize(
    "content", [b"no database at all, only words " * 100, b"SQLite format 3\0" + b"\xff" * 4080], ids=["text", "torn"]
)
async def test_a_file_that_is_no_database_is_told_and_left_alone(make: Make, spill_path: Path, content: bytes) -> None:
    spill_path.write_bytes(content)
    error = await refused(make, spill_path)
    assert isinstance(error, SpillCorrupt)
    assert "choose another path" in str(error)
    assert "move it away" in str(error)
    assert spill_path.read_bytes() == content


async def test_a_database_of_something_else_is_told_and_left_alone(make: Make, spill_path: Path) -> None:
    with sqlite3.connect(spill_path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    content = spill_path.read_bytes()
    error = await refused(make, spill_path)
    assert isinstance(error, SpillCorrupt)
    assert spill_path.read_bytes() == content


async def test_a_path_with_a_nul_is_told(make: Make, tmp_path: Path) -> None:
    broadcaster = make(NOWHERE, str(tmp_path) + "/a\0b")
    with pytest.raises(SpillCorrupt):
        await broadcaster.start(5)


async def test_two_in_one_process_cannot_share_a_file(make: Make, spill_path: Path) -> None:
    first = make(NOWHERE, spill_path)
    await first.safe_emit(event(1))
    await eventually(lambda: first.get_stats()["epoch"])
    error = await refused(make, spill_path)
    assert isinstance(error, SpillLocked)
    assert f"process {os.getpid()} (this process)" in str(error)
    assert "give each broadcaster its own spill_path, or stop the other" in str(error)
    assert numbers(list(first.spill)) == [1], "the owner is not disturbed"


async def test_after_a_refusal_events_wait_in_memory_and_a_repaired_path_saves_them(
    make: Make, tmp_path: Path, server: PlainServer
) -> None:
    path = tmp_path / "later" / "spill.db"
    broadcaster = make(server.url, path)
    with pytest.raises(SpillCorrupt):
        await broadcaster.safe_emit(event(1))
    with pytest.raises(SpillCorrupt):
        await broadcaster.start(5)
    with pytest.raises(SpillCorrupt):
        list(broadcaster.spill)
    with pytest.raises(SpillCorrupt):
        await asyncio.wait_for(broadcaster.flush_spill(), 5)
    path.parent.mkdir()
    await broadcaster.start(5)
    assert await broadcaster.drain(5)
    assert numbers(server.events) == [1]


async def test_stop_after_a_refusal_tells_of_events_that_nobody_has(make: Make, tmp_path: Path) -> None:
    broadcaster = make(NOWHERE, tmp_path / "missing" / "spill.db")
    assert await broadcaster.safe_emit(event(1), durability="memory") is False
    with pytest.raises(SpillCorrupt):
        await broadcaster.stop()


async def test_a_relative_path_and_unicode_work(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("spill.db", "Übung 😀.db", "./with space.db"):
        broadcaster = make(NOWHERE, name)
        await broadcaster.safe_emit(event(1))
        assert numbers(list(broadcaster.spill)) == [1]
        await broadcaster.stop(0)
        assert (tmp_path / name).exists()
