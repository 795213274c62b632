"""Who is told of violations: any number of notifiers, none of which can harm another or whoever raises the alert.

::

    alert_manager.add_notifier(EmailNotifier(...))
    await alert_manager.notify_violation_created(ViolationCreated(...))
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from safe_broadcaster.bus.event_bus import EventBus
from safe_broadcaster.bus.events import ViolationAcknowledged, ViolationCreated
from safe_broadcaster.exceptions import ConfigError

__all__ = ["AlertManager", "AlertNotifier"]


@runtime_checkable
class AlertNotifier(Protocol):
    """Takes alerts somewhere: mail, a webhook, a message bus. Plain methods may block: they run in a thread."""

    async def notify_violation_created(self, event: ViolationCreated) -> None:
        """Tell of a violation."""
        ...

    async def notify_violation_acknowledged(self, event: ViolationAcknowledged) -> None:
        """Tell that somebody has seen it."""
        ...


class AlertManager:
    """Publishes violations on an event bus, from which its notifiers have them.

    So they have what the bus gives: each gets its events in order and in its own time, and one that fails or hangs is
    logged and harms nobody.

    Args:
        event_bus: The bus. None: one of its own.

    """

    def __init__(self, event_bus: EventBus | None = None) -> None:
        self.event_bus = EventBus() if event_bus is None else event_bus
        self._notifiers: list[AlertNotifier] = []

    @property
    def notifiers(self) -> tuple[AlertNotifier, ...]:
        """Those that are told, in the order in which they were added."""
        return tuple(self._notifiers)

    def add_notifier(self, notifier: AlertNotifier) -> None:
        """Tell somebody more; adding one twice does nothing more, nor does one that listens to the bus itself.

        Raises:
            ConfigError: It lacks one of the two methods, or is a class and not an object of it.

        """
        if isinstance(notifier, type) or not isinstance(notifier, AlertNotifier):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"notifier={notifier!r} is not allowed: give an object with notify_violation_created(event) and "
                "notify_violation_acknowledged(event)"
            )
        if any(each is notifier for each in self._notifiers):
            return
        self._notifiers.append(notifier)
        if getattr(notifier, "event_bus", None) is not self.event_bus:  # as a WebSocketBroadcaster may be
            self.event_bus.subscribe(ViolationCreated, notifier.notify_violation_created)
            self.event_bus.subscribe(ViolationAcknowledged, notifier.notify_violation_acknowledged)

    def remove_notifier(self, notifier: AlertNotifier) -> bool:
        """Tell somebody no more; False if nobody did."""
        left = [each for each in self._notifiers if each is not notifier]
        found, self._notifiers = len(left) < len(self._notifiers), left
        self.event_bus.unsubscribe(ViolationCreated, notifier.notify_violation_created)
        self.event_bus.unsubscribe(ViolationAcknowledged, notifier.notify_violation_acknowledged)
        return found

    async def notify_violation_created(self, event: ViolationCreated) -> None:
        """Tell everyone of a violation; returns at once."""
        await self.event_bus.publish(event)

    async def notify_violation_acknowledged(self, event: ViolationAcknowledged) -> None:
        """Tell everyone that somebody has seen it; returns at once."""
        await self.event_bus.publish(event)
