"""The hub: one port, or a route of your own server, on which emitters bring events and dashboards hear them.

::

    async with EventBroadcaster(port=8000) as hub:
        await hub.broadcast("alert.disk", {"free": 0.02})
"""

from __future__ import annotations

from safe_broadcaster.hub.broadcaster import EventBroadcaster
from safe_broadcaster.hub.client import LocalClient
from safe_broadcaster.hub.config import HubConfig
from safe_broadcaster.hub.events import EventRegistry, WebSocketAlertEventType
from safe_broadcaster.hub.shared import get_broadcaster, stop_broadcaster

__all__ = [
    "EventBroadcaster",
    "EventRegistry",
    "HubConfig",
    "LocalClient",
    "WebSocketAlertEventType",
    "get_broadcaster",
    "stop_broadcaster",
]
