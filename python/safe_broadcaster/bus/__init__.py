"""Events inside a program, and their way to its WebSocket clients.

::

    from safe_broadcaster.bus import WebSocketBroadcaster, event_bus, manager

    broadcaster = WebSocketBroadcaster(manager, event_bus)
    await event_bus.publish(SampleProcessedEvent(characteristic_id=5, sample_id=1, mean=9.98))

`event_bus`, `manager` and `alert_manager` are the program's own, for those who do not want to pass them around.
"""

from __future__ import annotations

from safe_broadcaster.bus.alerts import AlertManager, AlertNotifier
from safe_broadcaster.bus.broadcaster import WebSocketBroadcaster
from safe_broadcaster.bus.connections import ConnectionManager, ManagerConfig
from safe_broadcaster.bus.event_bus import EventBus
from safe_broadcaster.bus.events import (
    ControlLimitsUpdatedEvent,
    SampleProcessedEvent,
    ViolationAcknowledged,
    ViolationCreated,
)

__all__ = [
    "AlertManager",
    "AlertNotifier",
    "ConnectionManager",
    "ControlLimitsUpdatedEvent",
    "EventBus",
    "ManagerConfig",
    "SampleProcessedEvent",
    "ViolationAcknowledged",
    "ViolationCreated",
    "WebSocketBroadcaster",
    "alert_manager",
    "event_bus",
    "manager",
]

event_bus = EventBus()
"""The program's event bus."""

manager = ConnectionManager()
"""The program's WebSocket clients."""

alert_manager = AlertManager(event_bus)
"""Who is told of violations in this program."""
