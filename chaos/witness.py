"""Independent subscribers: plain WebSocket clients that come back by their position and keep all that they got."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidMessage, WebSocketException

from chaos.events import number_in
from chaos.oracle import Entry, Gap, Stranger

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Sitting", "Witness"]

_PAUSE = 0.02
_EXCERPT = 200


@dataclass
class Sitting:
    """One connection of a witness to a hub, in the loop's time."""

    url: str
    begin: float
    end: float = float("inf")
    notices: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    """When the hub said how it was, and what."""


class Witness:
    """Follows the stream, at the hub whose URL it is given each time, until it is cancelled."""

    def __init__(self, url: Callable[[], str]) -> None:
        self._url = url
        self.sittings: list[Sitting] = []
        self.listens = asyncio.Event()
        """Set once it has its first position: from there on it misses nothing."""
        self.entries: list[Entry] = []
        self.violations: list[str] = []
        """Of the protocol between hub and subscriber."""
        self.epoch: str | None = None
        self.offset = 0

    async def run(self) -> None:
        """Connect, follow, connect again."""
        while True:
            url = self._url()
            try:
                async with connect(url, max_size=None, ping_interval=None, open_timeout=2, close_timeout=0.1) as hub:
                    await self._follow(hub, url)
            except (OSError, asyncio.TimeoutError, EOFError, InvalidHandshake, InvalidMessage, WebSocketException):
                pass  # it was killed, or is not there yet
            await asyncio.sleep(_PAUSE)

    async def _follow(self, hub: ClientConnection, url: str) -> None:
        data: dict[str, Any] = {"events": ["*"]}
        if self.epoch is not None:
            data["since"] = {"epoch": self.epoch, "offset": self.offset}
        await hub.send(orjson.dumps({"type": "subscribe", "data": data}).decode())
        time = asyncio.get_running_loop().time
        self.sittings.append(sitting := Sitting(url, time()))
        try:
            async for message in hub:
                frame = orjson.loads(message)
                if frame.get("type") == "service_status":
                    sitting.notices.append((time(), frame["data"]["status"]))
                else:
                    self.hear(frame)
        finally:
            sitting.end = time()

    def hear(self, frame: dict[str, Any]) -> None:
        """Take one frame of the hub."""
        match frame:
            case {"action": "subscribed", "epoch": str(epoch), "offset": int(offset)}:
                self._subscribed(epoch, offset, frame)
            case {"type": "event", "data": data}:
                self._advance(frame)
                n = number_in(data)
                self.entries.append(Stranger(orjson.dumps(data).decode()[:_EXCERPT]) if n is None else n)
            case {"type": "gap", "data": {"emitter": emitter, "from": first, "to": last, "reason": reason}}:
                self._advance(frame)
                self.entries.append(Gap(emitter, first, last, reason))
            case {"type": "bye" | "ping"}:
                pass
            case _:
                self.violations.append(f"a frame of no known kind: {frame}")

    def _subscribed(self, epoch: str, offset: int, frame: dict[str, Any]) -> None:
        if self.epoch is None:
            self.epoch, self.offset = epoch, offset
            self.listens.set()
        elif frame.get("recovered") is not True or epoch != self.epoch:
            self.violations.append(f"not recovered at {self.epoch}:{self.offset}: {frame}")
            self.epoch, self.offset = epoch, offset

    def _advance(self, frame: dict[str, Any]) -> None:
        if frame["prev"] != self.offset or frame["seq"] <= self.offset:
            self.violations.append(f"the chain is broken: {frame['prev']} → {frame['seq']} follows {self.offset}")
        self.offset = frame["seq"]
