"""The events that dashboards of cameras and services know, each with a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TypedBroadcasts"]


class TypedBroadcasts:
    """Conveniences over ``broadcast_event``: all return and raise what it does.

    Each takes the ``data`` of the event, or a whole event ``{"type": …, "data": {…}}``, whose own type then counts.
    Models for them are registered like any others, see `EventBroadcaster.events`.
    """

    async def broadcast_event(self, data: Mapping[str, Any]) -> int:
        """See `EventBroadcaster.broadcast_event`."""
        raise NotImplementedError

    async def broadcast_service_status(self, status_data: Mapping[str, Any]) -> int:
        """Publish a ``service_status``."""
        return await self._broadcast_as("service_status", status_data)

    async def broadcast_scene_change(self, scene_change_data: Mapping[str, Any]) -> int:
        """Publish a ``scene_change``."""
        return await self._broadcast_as("scene_change", scene_change_data)

    async def broadcast_camera_status(self, camera_status_data: Mapping[str, Any]) -> int:
        """Publish a ``camera_status``."""
        return await self._broadcast_as("camera_status", camera_status_data)

    async def broadcast_alert(self, alert_data: Mapping[str, Any], event_type: str) -> int:
        """Publish an alert of this type: a `WebSocketAlertEventType`, any other enum of texts, or a text."""
        kind = getattr(event_type, "value", event_type)
        return await self.broadcast_event({**_event(kind, alert_data), "type": kind})

    async def broadcast_worker_status(self, worker_status_data: Mapping[str, Any]) -> int:
        """Publish a ``worker_status``."""
        return await self._broadcast_as("worker_status", worker_status_data)

    async def broadcast_detection_new(self, detection_data: Mapping[str, Any]) -> int:
        """Publish a ``detection.new``."""
        return await self._broadcast_as("detection.new", detection_data)

    async def broadcast_detection_batch(self, batch_data: Mapping[str, Any]) -> int:
        """Publish a ``detection.batch``."""
        return await self._broadcast_as("detection.batch", batch_data)

    async def broadcast_infrastructure_alert(self, alert_data: Mapping[str, Any]) -> int:
        """Publish an ``infrastructure_alert``."""
        return await self._broadcast_as("infrastructure_alert", alert_data)

    async def broadcast_summary_update(
        self, hourly: Mapping[str, Any] | None = None, daily: Mapping[str, Any] | None = None
    ) -> int:
        """Publish a ``summary_update`` with both summaries; None is sent as null, there is none then."""
        return await self.broadcast_event({"type": "summary_update", "data": {"hourly": hourly, "daily": daily}})

    async def _broadcast_as(self, kind: str, data: Mapping[str, Any]) -> int:
        return await self.broadcast_event(_event(kind, data))


def _event(kind: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
    whole = "data" in data and isinstance(data.get("type"), str)
    return data if whole else {"type": kind, "data": data}
