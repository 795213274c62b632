"""Models of events: what the ``data`` of a type must look like, checked before anything is sent.

::

    hub.events.register("alert.*", Alert)  # a pydantic model, a dataclass, a TypedDict, or a function

Only what this program broadcasts itself is checked; what emitters bring was accepted from them already.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from safe_broadcaster import _core
from safe_broadcaster.exceptions import ConfigError, EventInvalid
from safe_broadcaster.hub.shape import Problem, check_shape, is_shape

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EventRegistry", "WebSocketAlertEventType"]

_SHOWN = 5
"""Most problems named in one error: enough to correct an event in one go."""


class WebSocketAlertEventType(str, enum.Enum):
    """Types of alerts; `EventBroadcaster.broadcast_alert` takes any other text too."""

    ALERT_CREATED = "alert.created"
    ALERT_UPDATED = "alert.updated"
    ALERT_ACKNOWLEDGED = "alert.acknowledged"
    ALERT_DISMISSED = "alert.dismissed"
    ALERT_RESOLVED = "alert.resolved"
    ALERT_DELETED = "alert.deleted"


class EventRegistry:
    """Models by pattern. Where several patterns match a type, the most specific one counts: no ``*``, then the longest.

    May be used from any thread.
    """

    def __init__(self) -> None:
        self._models: dict[str, object] = {}

    def register(self, pattern: str, model: object) -> None:
        """Have the ``data`` of matching events checked.

        Args:
            pattern: A type, or a pattern as subscribers use it (``alert.*``). Registering it again replaces the model.
            model: A pydantic model: the event is sent as ``model_dump(mode="json")`` gives it, with its defaults. A
                dataclass or `typing.TypedDict`: names, and types as far as they are plain; the data is sent as it is.
                Any function: called with the data, returns what to send (None: the same), and raises `ValueError` or
                `TypeError` for what is wrong.

        Raises:
            ConfigError: The pattern is none, or the model is none of these.

        """
        _core.matches(pattern, "")  # refuses what is no pattern
        if not (hasattr(model, "model_validate") or is_shape(model) or callable(model)):
            raise ConfigError(
                f"model={model!r} is not allowed: give a pydantic model, a dataclass, a TypedDict or a function"
            )
        self._models = {**self._models, pattern: model}

    def unregister(self, pattern: str) -> None:
        """Check no longer; unknown patterns are fine."""
        self._models = {known: model for known, model in self._models.items() if known != pattern}

    def model_for(self, kind: str) -> object | None:
        """Return the model that counts for a type, if there is one."""
        matching = [pattern for pattern in self._models if _core.matches(pattern, kind)]
        if not matching:
            return None
        return self._models[max(matching, key=lambda pattern: ("*" not in pattern, len(pattern)))]

    def validate(self, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the event as it is to be sent.

        Raises `EventInvalid` naming the type, the fields and what is wrong with them.
        """
        if not self._models or not isinstance(event, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            return event  # what is no mapping is refused by whoever serialises it
        kind = event.get("type")
        model = self.model_for(kind) if isinstance(kind, str) else None
        if model is None:
            return event
        return {**event, "data": _validated(str(kind), model, event.get("data"))}


def _validated(kind: str, model: Any, data: object) -> object:
    if hasattr(model, "model_validate"):
        try:
            return model.model_validate({} if data is None else data).model_dump(mode="json")
        except ValueError as error:  # pydantic's own is one
            raise _invalid(kind, model, _told_by_pydantic(error)) from error
    if is_shape(model):
        problems = list(itertools.islice(check_shape(model, {} if data is None else data), _SHOWN + 1))
        if problems:
            raise _invalid(kind, model, problems)
        return data
    try:
        changed = cast("Callable[[object], object]", model)(data)
    except (ValueError, TypeError) as error:
        raise _invalid(kind, model, [Problem("data", str(error))]) from error
    return data if changed is None else changed


def _told_by_pydantic(error: ValueError) -> list[Problem]:
    errors: Callable[[], list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if errors is None:
        return [Problem("data", str(error))]
    return [Problem(".".join(["data", *map(str, each["loc"])]), each["msg"]) for each in errors()]


def _invalid(kind: str, model: object, problems: list[Problem]) -> EventInvalid:
    told = "; ".join(
        f"{field} {what}" if what.startswith("is ") else f"{field}: {what}" for field, what in problems[:_SHOWN]
    )
    more = "; and more" if len(problems) > _SHOWN else ""
    name = getattr(model, "__name__", repr(model))
    return EventInvalid(
        f"the event {kind!r} does not fit {name}: {told}{more}. "
        "Correct the event, or register another model for its type"
    )
