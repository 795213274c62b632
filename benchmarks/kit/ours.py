"""`SafeBroadcaster` as every benchmark sets it up; apart from its peers, whose memory is not its own."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def safe_broadcaster(url: str, spill: Path, **settings: Any) -> Any:
    """A `SafeBroadcaster` with the settings of all benchmarks: those that users get, limits that are never reached."""
    from safe_broadcaster import SafeBroadcaster  # noqa: PLC0415 the peers run without it

    limits = {"spill_max_events": 4_000_000, "spill_max_bytes": 4 << 30}
    return SafeBroadcaster(url, spill_path=str(spill), health_bus=None, **limits, **settings)


async def start_offline(broadcaster: Any) -> None:
    """Starts it where nobody listens: the spill is open then, and it goes on trying to connect."""
    with suppress(TimeoutError):
        await broadcaster.start(timeout=0.2)


class Ours:
    """`SafeBroadcaster`, confirming by Ping and Pong, as with any plain server; its files lie in `folder`."""

    def __init__(self, folder: Path | None = None, **settings: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="safe-broadcaster-bench-", dir=folder)
        self._settings = settings

    async def open(self, url: str) -> None:
        self.broadcaster = safe_broadcaster(url, Path(self._folder.name) / "spill.db", **self._settings)
        await self.broadcaster.start(timeout=10)
        self.emit = self.broadcaster.safe_emit

    async def close(self) -> None:
        await self.broadcaster.stop(drain_timeout=5)
        self._folder.cleanup()
