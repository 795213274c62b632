"""Events of statistical process control, and how any event becomes the payload of a message."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from safe_broadcaster.timestamps import utc_now

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

__all__ = [
    "ControlLimitsUpdatedEvent",
    "SampleProcessedEvent",
    "ViolationAcknowledged",
    "ViolationCreated",
    "payload_of",
]


@dataclass(frozen=True)
class SampleProcessedEvent:
    """A sample of a characteristic was measured and judged."""

    characteristic_id: int | str | UUID
    """What was measured: whoever subscribed to it hears of it."""
    sample_id: int | str | UUID
    mean: float
    """Mean of the sample, in the unit of the characteristic."""
    range_value: float | None = None
    """Largest less smallest value of the sample, in the same unit."""
    zone: str | None = None
    """Zone of the control chart that the mean lies in."""
    in_control: bool = True
    timestamp: datetime = field(default_factory=utc_now)
    data: Mapping[str, Any] | None = None
    """Whatever else clients are to see."""


@dataclass(frozen=True)
class ViolationCreated:
    """A sample broke a rule of its control chart."""

    characteristic_id: int | str | UUID
    violation_id: int | str | UUID
    sample_id: int | str | UUID | None = None
    rule_id: int | str | None = None
    rule_name: str | None = None
    severity: str = "warning"
    timestamp: datetime = field(default_factory=utc_now)
    data: Mapping[str, Any] | None = None
    """Whatever else clients are to see."""


@dataclass(frozen=True)
class ViolationAcknowledged:
    """Somebody has seen a violation."""

    violation_id: int | str | UUID
    user: str | None = None
    reason: str | None = None
    characteristic_id: int | str | UUID | None = None
    timestamp: datetime = field(default_factory=utc_now)
    data: Mapping[str, Any] | None = None
    """Whatever else clients are to see."""


@dataclass(frozen=True)
class ControlLimitsUpdatedEvent:
    """The limits of a control chart were computed anew, in the unit of the characteristic."""

    characteristic_id: int | str | UUID
    center_line: float
    ucl: float
    """Upper control limit."""
    lcl: float
    """Lower control limit."""
    timestamp: datetime = field(default_factory=utc_now)
    data: Mapping[str, Any] | None = None
    """Whatever else clients are to see."""


def payload_of(event: object) -> Mapping[str, Any]:
    """Return what clients see of an event: the fields of a dataclass, pydantic model, mapping or plain object.

    Raises:
        TypeError: It has no fields.

    """
    if isinstance(event, Mapping):
        return cast("Mapping[str, Any]", event)
    if dataclasses.is_dataclass(event):
        return {each.name: getattr(event, each.name) for each in dataclasses.fields(event)}
    dump = getattr(event, "model_dump", None)
    if callable(dump):
        return cast("Mapping[str, Any]", dump(mode="json"))
    return dict(vars(event))
