"""From the event bus to WebSocket clients.

::

    broadcaster = WebSocketBroadcaster(ws_manager, event_bus)  # from now on
    await event_bus.publish(SampleProcessedEvent(characteristic_id=5, sample_id=1, mean=9.98))

Clients get ``{"type": …, "payload": …}``:

=============================  ==================  ===================================
event                          type                who gets it
=============================  ==================  ===================================
`SampleProcessedEvent`         ``sample``          subscribers of its characteristic
`ViolationCreated`             ``violation``       subscribers of its characteristic
`ViolationAcknowledged`        ``ack_update``      everyone
`ControlLimitsUpdatedEvent`    ``control_limits``  subscribers of its characteristic
=============================  ==================  ===================================
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from safe_broadcaster.bus.events import (
    ControlLimitsUpdatedEvent,
    SampleProcessedEvent,
    ViolationAcknowledged,
    ViolationCreated,
    payload_of,
)
from safe_broadcaster.checks import check_callable, check_choice
from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from safe_broadcaster.bus.event_bus import EventBus

__all__ = ["Destination", "WebSocketBroadcaster"]

logger = logging.getLogger(__name__)

Destination = Literal["characteristic", "all"]
"""Who gets a message: those that subscribed to the event's ``characteristic_id``, or everyone."""


class Manager(Protocol):
    """What is used of a `ConnectionManager`."""

    async def broadcast(self, message: Mapping[str, Any]) -> int: ...
    async def broadcast_to_characteristic(self, characteristic_id: Any, message: Mapping[str, Any]) -> int: ...


class _Route(NamedTuple):
    message_type: str
    destination: Destination
    payload: Callable[[Any], Mapping[str, Any]]


class WebSocketBroadcaster:
    """See the module. It listens from the moment it is made until `stop`.

    It is an `AlertNotifier` too, for programs whose alerts do not come over the bus. What fails is logged under this
    module's logger (at debug level it tells of each message) and never reaches whoever published.

    Args:
        ws_manager: A `ConnectionManager`, or anything with its ``broadcast`` and ``broadcast_to_characteristic``.
        event_bus: Where the events come from.

    Raises:
        ConfigError: The manager lacks a method.

    """

    def __init__(self, ws_manager: Manager, event_bus: EventBus) -> None:
        for method in ("broadcast", "broadcast_to_characteristic"):
            if not callable(getattr(ws_manager, method, None)):
                raise ConfigError(
                    f"ws_manager={ws_manager!r} is not allowed: it has no {method}(); give a ConnectionManager "
                    "(ConnectionManager(hub=hub) for a hub)"
                )
        self.ws_manager = ws_manager
        self.event_bus = event_bus
        self._routes: dict[type, _Route] = {}
        self.route(SampleProcessedEvent, "sample")
        self.route(ViolationCreated, "violation")
        self.route(ViolationAcknowledged, "ack_update", to="all")
        self.route(ControlLimitsUpdatedEvent, "control_limits")

    def route(
        self,
        event_type: type,
        message_type: str,
        *,
        to: Destination = "characteristic",
        payload: Callable[[Any], Mapping[str, Any]] = payload_of,
    ) -> None:
        """Send events of another class too, or those of a known class differently.

        Args:
            event_type: The class.
            message_type: The ``type`` of the message.
            to: Who gets it.
            payload: Makes the ``payload``; by default the fields of a dataclass, pydantic model or mapping.

        Raises:
            ConfigError: An argument is none of what is allowed.

        """
        check_choice("to", to, get_args(Destination))
        check_callable("payload", payload)
        self.event_bus.subscribe(event_type, self.send)
        self._routes[event_type] = _Route(message_type, to, payload)

    def stop(self) -> None:
        """Listen no more."""
        for event_type in self._routes:
            self.event_bus.unsubscribe(event_type, self.send)

    async def notify_violation_created(self, event: ViolationCreated) -> None:
        """Send a ``violation``."""
        await self.send(event)

    async def notify_violation_acknowledged(self, event: ViolationAcknowledged) -> None:
        """Send an ``ack_update``."""
        await self.send(event)

    async def send(self, event: object) -> int:
        """Send an event to whom it concerns, and return to how many; 0 if that failed, which is logged."""
        try:
            route = self._route_of(type(event))
            payload = route.payload(event)
            message = {"type": route.message_type, "payload": payload}
            if route.destination == "all":
                count = await self.ws_manager.broadcast(message)
            else:
                count = await self.ws_manager.broadcast_to_characteristic(_characteristic(event, payload), message)
        except Exception:
            logger.exception("an event %s could not be broadcast", type(event).__name__)
            return 0
        logger.debug("broadcast %s to %s: %s clients", route.message_type, route.destination, count)
        return count

    def _route_of(self, event_type: type) -> _Route:
        for above in event_type.__mro__:
            if above in self._routes:
                return self._routes[above]
        raise ConfigError(f"events of {event_type.__name__} have no route: call route() first")


def _characteristic(event: object, payload: Mapping[str, Any]) -> Any:
    found = getattr(event, "characteristic_id", None)
    return payload["characteristic_id"] if found is None else found
