"""Events that can never be sent: the error named in the docs, nothing stored, counters tell."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import math
import types
import uuid
from collections import OrderedDict, UserDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from safe_broadcaster import EventNotSerializable, EventTooLarge, SafeBroadcaster
from support import NOWHERE, PlainServer, event, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., SafeBroadcaster]


def circular() -> dict[str, Any]:
    loop: dict[str, Any] = {"type": "x"}
    loop["self"] = loop
    return loop


def deep(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return {"deep": value}


@dataclasses.dataclass
class Reading:
    value: float


NOT_MAPPINGS = {
    "None": None,
    "text": "event",
    "bytes": b"{}",
    "number": 7,
    "list of pairs": [("type", "x")],
    "set": {"type"},
    "class": dict,
}
NOT_JSON = {
    "object": {"a": object()},
    "bytes": {"a": b"x"},
    "set": {"a": {1}},
    "complex": {"a": 1j},
    "function": {"a": print},
    "circular": circular(),
    "too deep": deep(2000),
    "NaN": {"a": math.nan},
    "infinity": {"a": [1.0, {"b": -math.inf}]},
    "NaN beside None": {"a": None, "b": math.nan},
    "NaN in a tuple": {"a": (1, math.nan)},
    "NaN in a dataclass": {"a": Reading(math.nan)},
    "NaN in numpy": {"a": np.array([1.0, math.nan])},
    "numpy NaN": {"a": np.float64("nan")},
    "huge int": {"a": 1 << 64},
    "huge negative int": {"a": -(1 << 63) - 1},
    "lone surrogate": {"a": "\ud800"},
    "lone surrogate as key": {"\udfff": 1},
    "integer key": {1: "a"},
    "nested tuple key": {"a": {(1, 2): 3}},
    "None as key": {None: 1},
}


@pytest.fixture
async def broadcaster(make: Make) -> SafeBroadcaster:
    return make(NOWHERE)


@pytest.mark.parametrize("bad", NOT_MAPPINGS.values(), ids=NOT_MAPPINGS.keys())
async def test_only_mappings_are_events(broadcaster: SafeBroadcaster, bad: Any) -> None:
    with pytest.raises(EventNotSerializable, match="mapping"):
        await broadcaster.safe_emit(bad)
    with pytest.raises(TypeError):
        broadcaster.emit_nowait(bad)
    stats = broadcaster.get_stats()
    assert (stats["rejected"], stats["last_seq"], len(broadcaster.spill)) == (2, 0, 0)


@pytest.mark.parametrize("bad", NOT_JSON.values(), ids=NOT_JSON.keys())
async def test_what_json_cannot_carry_is_refused(broadcaster: SafeBroadcaster, bad: dict[str, Any]) -> None:
    with pytest.raises(EventNotSerializable):
        await broadcaster.safe_emit(bad)
    with pytest.raises(TypeError):
        broadcaster.emit_nowait(bad)
    stats = broadcaster.get_stats()
    assert (stats["rejected"], stats["last_seq"], len(broadcaster.spill)) == (2, 0, 0)


async def test_a_nan_is_named_with_its_place(broadcaster: SafeBroadcaster) -> None:
    with pytest.raises(EventNotSerializable, match=r"event\['a'\]\[1\]\['b'\] is nan"):
        broadcaster.safe_emit({"a": [1, {"b": math.nan}]})


async def test_the_cause_is_kept(broadcaster: SafeBroadcaster) -> None:
    with pytest.raises(EventNotSerializable) as caught:
        broadcaster.safe_emit({"a": object()})
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("size", [1 << 20, 100 << 20], ids=["just over 1 MiB", "100 MB"])
async def test_a_text_over_the_limit_is_refused_and_the_limit_named(broadcaster: SafeBroadcaster, size: int) -> None:
    with pytest.raises(EventTooLarge, match="max_event_bytes=1048576"):
        await broadcaster.safe_emit({"a": "x" * size})
    with pytest.raises(ValueError, match="max_event_bytes"):
        broadcaster.emit_nowait({"a": "x" * size})
    stats = broadcaster.get_stats()
    assert (stats["rejected"], stats["last_seq"], len(broadcaster.spill)) == (2, 0, 0)


async def test_the_limit_itself_is_allowed_and_arrives(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url, max_event_bytes=1000)
    await broadcaster.start(5)
    fits: dict[str, Any] = {"a": "x" * (1000 - len('{"a":""}'))}
    assert await broadcaster.safe_emit(fits, durability="delivered") is True
    assert server.events == [fits]
    with pytest.raises(EventTooLarge):
        broadcaster.safe_emit({"a": "x" * (1001 - len('{"a":""}'))})


async def test_an_error_from_the_event_itself_is_not_swallowed(broadcaster: SafeBroadcaster) -> None:
    class Broken(UserDict[str, Any]):
        def keys(self) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broadcaster.safe_emit(Broken())
    assert broadcaster.get_stats()["last_seq"] == 0


async def test_bad_events_do_not_disturb_good_ones(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    for n in range(50):
        await broadcaster.safe_emit(event(n))
        with pytest.raises(EventNotSerializable):
            await broadcaster.safe_emit({"n": math.nan})
    outcomes = await asyncio.gather(*(broadcaster.safe_emit(event(50 + n)) for n in range(50)))
    assert outcomes == [True] * 50
    await eventually(lambda: [each["content"]["n"] for each in server.events] == list(range(100)))
    assert broadcaster.get_stats()["rejected"] == 50


async def test_what_orjson_knows_is_carried(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    at = datetime.datetime(2025, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    key = uuid.UUID(int=7)
    events: list[Any] = [
        {},
        {"none": None, "nested": {"none": [None]}},
        {"text": "null and NaN are words"},
        {"at": at, "key": key, "reading": Reading(0.5)},
        {"array": np.array([1.0, 2.0]), "scalar": np.float32(0.5), "integers": np.arange(3)},
        {"big": (1 << 64) - 1, "small": -(1 << 63)},
        {"emoji": "😀", "nul": "\0", "unicode key ü": 1},
        OrderedDict(a=1),
        UserDict({"b": 2}),
        types.MappingProxyType({"c": 3}),
        deep(200),
    ]
    for each in events:
        assert await broadcaster.safe_emit(each) is True
    assert await broadcaster.drain(5)
    assert server.events[:3] == events[:3]
    assert server.events[3] == {"at": at.isoformat(), "key": str(key), "reading": {"value": 0.5}}
    assert server.events[4] == {"array": [1.0, 2.0], "scalar": 0.5, "integers": [0, 1, 2]}
    assert server.events[5:7] == events[5:7]
    assert server.events[7:10] == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert server.events[10] == events[10]
