"""Fixtures: a directory for spills, a broadcaster that is stopped in the end, a plain server."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import BroadcastError, SafeBroadcaster
from support import QUICK, HealthBus, PlainServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@pytest.fixture
def spill_path(tmp_path: Path) -> Path:
    return tmp_path / "spill.db"


@pytest.fixture
def bus() -> HealthBus:
    return HealthBus()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., SafeBroadcaster]]:
    """Make broadcasters with quick settings, each with a spill of its own unless one is given."""
    made: list[SafeBroadcaster] = []
    names = itertools.count(1)

    def build(ws_client: object, spill_path: object = None, health_bus: Any = None, **settings: Any) -> SafeBroadcaster:
        path = tmp_path / f"spill-{next(names)}.db" if spill_path is None else spill_path
        made.append(SafeBroadcaster(ws_client, path, health_bus, **{**QUICK, **settings}))
        return made[-1]

    yield build
    for broadcaster in made:
        with contextlib.suppress(BroadcastError):  # a test may have stopped or broken it
            await broadcaster.stop(0)


@pytest.fixture
async def server() -> AsyncIterator[PlainServer]:
    async with PlainServer() as running:
        yield running
