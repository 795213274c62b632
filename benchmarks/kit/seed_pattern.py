"""The emitter that engines run today, reduced to what an emit does: `json.dumps` and one socket write."""

import json
import logging
from collections import deque
from datetime import datetime, timezone

from websockets.asyncio.client import ClientConnection, connect
from websockets.protocol import State

log = logging.getLogger(__name__)


class WebsocketsClient:
    """The pattern's `ws_client`, over the `websockets` package."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._socket: ClientConnection | None = None

    async def connect(self) -> None:
        self._socket = await connect(self._url)

    def is_available(self) -> bool:
        return self._socket is not None and self._socket.state is State.OPEN

    async def send(self, event: dict) -> None:
        await self._socket.send(json.dumps(event))

    async def close(self) -> None:
        await self._socket.close()


class HealthBus:
    """Keeps the latest reports."""

    def __init__(self) -> None:
        self.latest: deque[dict] = deque(maxlen=1000)

    async def inject(self, report: dict) -> None:
        self.latest.append(report)


class SeedBroadcaster:
    """Sends while the socket is open; else keeps the event in a deque and reports it."""

    def __init__(self, ws_client: WebsocketsClient, health_bus: HealthBus) -> None:
        self.ws = ws_client
        self.spill: deque[dict] = deque(maxlen=10_000)
        self.health_bus = health_bus
        self.emit_count = 0
        self.spill_count = 0

    async def start(self) -> None:
        await self.ws.connect()
        await self._report("broadcaster_ready", success=True)

    async def safe_emit(self, event: dict) -> bool:
        try:
            if not self.ws.is_available():
                raise RuntimeError("ws_not_ready")  # noqa: TRY301 as the pattern has it
            await self.ws.send(event)
        except Exception as error:  # noqa: BLE001 as the pattern has it
            self.spill.append(event)
            self.spill_count += 1
            log.warning("Spilled event (topic: %s): %s", event.get("topic", "unknown"), error)
            await self._report("broadcaster_spill", success=False, spill_depth=len(self.spill))
            return False
        self.emit_count += 1
        return True

    async def _report(self, event_type: str, *, success: bool, **metrics: object) -> None:
        await self.health_bus.inject(
            {
                "type": "health.compliance.snapshot",
                "content": {
                    "emitter": "broadcaster",
                    "event_type": event_type,
                    "success": success,
                    "metrics": {"total_emits": self.emit_count, "total_spills": self.spill_count, **metrics},
                },
                "timestamp": datetime.now(timezone.utc).isoformat(),
            }
        )
