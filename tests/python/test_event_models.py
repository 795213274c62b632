"""Events that do not fit the model of their type are refused by name before anything is sent."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Literal, TypedDict

import pydantic
import pytest

from safe_broadcaster import BroadcastError, ConfigError, EventBroadcaster, EventInvalid, EventRegistry


class Level(Enum):
    LOW = "low"
    HIGH = "high"


@dataclasses.dataclass
class Place:
    name: str
    floor: int = 0


@dataclasses.dataclass
class Alert:
    severity: Level
    places: list[Place]
    score: float | None = None
    tags: dict[str, int] = dataclasses.field(default_factory=dict)
    state: Literal["new", "old"] = "new"


class Camera(TypedDict):
    id: str
    online: bool


class Detection(pydantic.BaseModel):
    label: str
    confidence: float = 0.5


def positive(data: dict) -> dict:
    if data["n"] <= 0:
        raise ValueError("n must be positive")
    return {"n": data["n"], "checked": True}


GOOD = [
    (Alert, {"severity": "high", "places": [{"name": "a", "floor": 2}], "score": 1, "tags": {"x": 1}}),
    (Alert, {"severity": Level.LOW, "places": [Place("a")]}),
    (Camera, {"id": "c1", "online": True}),
    (positive, {"n": 1}),
    (Detection, {"label": "cat"}),
]

BAD = [
    (Alert, {"places": []}, ["data.severity is missing"]),
    (Alert, {"severity": "middle", "places": []}, ["data.severity is str, not Level"]),
    (Alert, {"severity": "low", "places": [{"floor": 1}]}, ["data.places[0].name is missing"]),
    (Alert, {"severity": "low", "places": {}}, ["data.places is dict, not a list"]),
    (Alert, {"severity": "low", "places": [], "score": "x"}, ["data.score is str", "float"]),
    (Alert, {"severity": "low", "places": [], "score": True}, ["data.score is bool"]),
    (Alert, {"severity": "low", "places": [], "tags": {"x": "y"}}, ["data.tags.x is str, not int"]),
    (Alert, {"severity": "low", "places": [], "state": "odd"}, ["data.state is 'odd', not one of 'new', 'old'"]),
    (Alert, {"severity": "low", "places": [], "colour": 1}, ["data.colour is not a field of Alert"]),
    (Alert, [], ["data is list, not an object"]),
    (Camera, {"id": "c1"}, ["data.online is missing"]),
    (Camera, {"id": 1, "online": "yes"}, ["data.id is int, not str", "data.online is str, not bool"]),
    (positive, {"n": 0}, ["data: n must be positive"]),
    (Detection, {"confidence": "much"}, ["data.label: Field required", "data.confidence: "]),
    (Detection, None, ["data.label: Field required"]),
]


@pytest.mark.parametrize(("model", "data"), GOOD, ids=lambda each: getattr(each, "__name__", ""))
def test_what_fits_passes(model, data) -> None:
    events = EventRegistry()
    events.register("x.*", model)
    changed = {positive: {"n": 1, "checked": True}, Detection: {"label": "cat", "confidence": 0.5}}
    assert events.validate({"type": "x.y", "data": data, "topic": "t"}) == {
        "type": "x.y",
        "data": changed.get(model, data),
        "topic": "t",
    }


@pytest.mark.parametrize(("model", "data", "words"), BAD, ids=lambda each: getattr(each, "__name__", ""))
def test_what_does_not_fit_is_told_by_type_field_and_remedy(model, data, words) -> None:
    events = EventRegistry()
    events.register("x.*", model)
    with pytest.raises(EventInvalid) as refused:
        events.validate({"type": "x.y", "data": data})
    for word in ["the event 'x.y' does not fit", "Correct the event", *words]:
        assert word in str(refused.value)
    assert isinstance(refused.value, BroadcastError)
    assert isinstance(refused.value, ValueError)


async def test_an_invalid_event_is_not_sent() -> None:
    async with EventBroadcaster(port=0) as hub:
        hub.events.register("detection.*", Detection)
        with pytest.raises(EventInvalid, match=r"detection\.new.*data\.label"):
            await hub.broadcast_detection_new({"confidence": 1})
        assert hub.get_stats()["events"] == 0
        await hub.broadcast_detection_new({"label": "cat"})
        assert hub.get_messages_since(0)[0]["data"]["data"] == {"label": "cat", "confidence": 0.5}


def test_the_most_specific_pattern_counts_and_models_can_be_replaced_and_removed() -> None:
    events = EventRegistry()
    for pattern in ("*", "a.*", "a.b", "a.b.*"):
        events.register(pattern, lambda data, pattern=pattern: [pattern, data])
    told = {kind: events.validate({"type": kind, "data": 0})["data"][0] for kind in ("x", "a.x", "a.b", "a.b.c")}
    assert told == {"x": "*", "a.x": "a.*", "a.b": "a.b", "a.b.c": "a.b.*"}
    events.register("a.b", lambda data: None)
    assert events.validate({"type": "a.b", "data": 7})["data"] == 7
    events.unregister("a.b")
    events.unregister("never")
    assert events.validate({"type": "a.b", "data": 0})["data"][0] == "a.*"


@pytest.mark.parametrize(("pattern", "model"), [("", Alert), ("a\n", Alert), ("a", 7), ("a", "text")])
def test_what_is_no_pattern_or_model_is_refused(pattern, model) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        EventRegistry().register(pattern, model)
