"""A heartbeat shows that an engine lives, whatever its snapshot does, and says goodbye when it is stopped."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timezone

import pytest

from safe_broadcaster import BroadcasterClosed, ConfigError, EventNotSerializable, Heartbeat, SpillFull
from safe_broadcaster.emitter import _Outcome
from virtual import now, virtual


class Broadcaster:
    """Takes events as a SafeBroadcaster does, and knows when."""

    def __init__(self) -> None:
        self.events: list[dict] = []
        self.times: list[float] = []
        self.error: Exception | None = None
        self.outcome_takes = 0.0

    def safe_emit(self, event):
        if self.error is not None:
            raise self.error
        if "unserialisable" in event["content"]:
            raise EventNotSerializable("event['content'] holds an object")
        self.events.append(event)
        self.times.append(now())
        return asyncio.sleep(self.outcome_takes, result=True)

    def contents(self) -> list[dict]:
        return [event["content"] for event in self.events]


@virtual
async def test_it_beats_at_once_and_then_every_interval_in_the_patterns_form() -> None:
    broadcaster, before = Broadcaster(), datetime.now(timezone.utc)
    async with Heartbeat(broadcaster, "ada", snapshot=lambda: {"wm_size": 3}) as heartbeat:
        await asyncio.sleep(95)
        assert broadcaster.times == [0, 30, 60, 90]
        assert heartbeat.beats == 4
    event = broadcaster.events[0]
    assert {name: event[name] for name in ("type", "topic", "content")} == {
        "type": "graph.delta.heartbeat",
        "topic": "graph/ada/delta/heartbeat",
        "content": {"citizen_id": "ada", "wm_size": 3},
    }
    assert before <= datetime.fromisoformat(event["timestamp"]) <= datetime.now(timezone.utc)


@virtual
async def test_a_stop_says_goodbye_once_and_ends_the_beat() -> None:
    broadcaster = Broadcaster()
    heartbeat = Heartbeat(broadcaster, "ada")
    await heartbeat.stop()
    assert broadcaster.events == [], "it never lived"
    await heartbeat.start()
    await heartbeat.start()
    await asyncio.sleep(1)
    assert heartbeat.is_beating()
    await heartbeat.stop()
    await heartbeat.stop()
    await asyncio.sleep(100)
    assert [event["type"] for event in broadcaster.events] == ["graph.delta.heartbeat", "graph.delta.heartbeat.gone"]
    assert broadcaster.events[1]["topic"] == "graph/ada/delta/heartbeat"
    assert not heartbeat.is_beating()
    await heartbeat.start()
    await asyncio.sleep(1)
    assert len(broadcaster.events) == 3
    await heartbeat.stop()


@virtual
async def test_a_goodbye_that_fails_is_logged_and_what_follows_in_the_shutdown_goes_on(caplog) -> None:
    broadcaster = Broadcaster()
    async with Heartbeat(broadcaster, "ada"):
        await asyncio.sleep(1)
        broadcaster.error = SpillFull("no room")
    [record] = [record for record in caplog.records if "goodbye" in record.message]
    assert record.citizen_id == "ada"
    assert "no room" in caplog.text


class Full(Broadcaster):
    """Accepts by the await only, as a broadcaster does whose memory is full, and which is to wait."""

    def safe_emit(self, event: dict):
        async def never() -> bool:
            return await asyncio.get_running_loop().create_future()

        return _Outcome(never, is_accepted=False)


@virtual
async def test_a_beat_that_is_not_accepted_in_time_does_not_count() -> None:
    heartbeat = Heartbeat(Full(), "ada", interval=10)
    await heartbeat.start()
    await asyncio.sleep(35)
    assert heartbeat.beats == 0
    await heartbeat.stop()


async def hangs() -> dict:
    await asyncio.sleep(1e6)
    return {}


async def fails() -> dict:
    raise OSError("no graph")


async def gives() -> dict:
    await asyncio.sleep(1)
    return {"wm_size": 3}


async def cancels_itself() -> dict:
    raise asyncio.CancelledError


SNAPSHOTS = {
    "raises": (lambda: 1 / 0, "ZeroDivisionError"),
    "async raises": (fails, "OSError: no graph"),
    "hangs": (hangs, "within 5 s"),
    "garbage": (lambda: 7, "returned int, not a mapping"),
    "nothing": (lambda: None, "returned NoneType"),
    "unserialisable": (lambda: {"unserialisable": object()}, "EventNotSerializable"),
    "cancels itself": (cancels_itself, "cancelled from within"),
}


@pytest.mark.parametrize("kind", SNAPSHOTS)
def test_a_snapshot_that_fails_does_not_stop_the_heart_and_is_told_in_the_beat_and_once_in_the_log(
    kind: str, caplog
) -> None:
    snapshot, words = SNAPSHOTS[kind]

    @virtual
    async def beats() -> None:
        broadcaster = Broadcaster()
        async with Heartbeat(broadcaster, "ada", snapshot=snapshot):
            await asyncio.sleep(70)
        assert len(broadcaster.events) == 4
        for content in broadcaster.contents()[:3]:
            assert content["citizen_id"] == "ada"
            assert words in content["snapshot_error"]

    beats()
    errors = [record for record in caplog.records if record.name == "safe_broadcaster.heartbeat"]
    assert len(errors) == 1
    assert words in errors[0].getMessage()


def test_a_snapshot_that_works_again_is_told_too(caplog) -> None:
    caplog.set_level(logging.INFO, "safe_broadcaster.heartbeat")
    answers = iter([{}, 7, {"wm_size": 1}])

    @virtual
    async def beats() -> None:
        async with Heartbeat(Broadcaster(), "ada", snapshot=lambda: next(answers)):
            await asyncio.sleep(61)

    beats()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


@virtual
async def test_a_snapshot_may_be_async_and_cannot_change_who_it_is() -> None:
    broadcaster = Broadcaster()
    async with Heartbeat(broadcaster, "ada", snapshot=gives):
        await asyncio.sleep(2)
    async with Heartbeat(broadcaster, "ada", snapshot=lambda: {"citizen_id": "eve"}):
        await asyncio.sleep(2)
    assert broadcaster.contents()[0] == {"citizen_id": "ada", "wm_size": 3}
    assert broadcaster.contents()[2] == {"citizen_id": "ada"}


@virtual
async def test_a_link_that_is_down_does_not_hold_up_the_next_beat() -> None:
    broadcaster = Broadcaster()
    broadcaster.outcome_takes = 1e6
    heartbeat = Heartbeat(broadcaster, "ada", interval=10)
    await heartbeat.start()
    await asyncio.sleep(35)
    assert broadcaster.times == [0, 10, 20, 30]
    await heartbeat.stop()
    assert now() < 40, "the goodbye is not waited for either"


def test_it_ends_with_its_broadcaster_and_says_so(caplog) -> None:
    @virtual
    async def beats() -> None:
        broadcaster = Broadcaster()
        heartbeat = Heartbeat(broadcaster, "ada")
        await heartbeat.start()
        await asyncio.sleep(1)
        broadcaster.error = BroadcasterClosed("stopped")
        await asyncio.sleep(60)
        assert not heartbeat.is_beating()
        await heartbeat.stop()

    beats()
    assert "the heartbeat of ada ends: stopped" in caplog.text


def test_a_broadcaster_that_fails_otherwise_is_tried_again(caplog) -> None:
    @virtual
    async def beats() -> None:
        broadcaster = Broadcaster()
        broadcaster.error = OSError("odd")
        async with Heartbeat(broadcaster, "ada"):
            await asyncio.sleep(31)
            broadcaster.error = None
            await asyncio.sleep(30)
            assert broadcaster.times == [60]

    beats()
    assert caplog.text.count("could not be emitted") == 2


@virtual
async def test_a_loop_that_was_held_up_does_not_beat_twice_for_it() -> None:
    broadcaster = Broadcaster()
    async with Heartbeat(broadcaster, "ada", interval=10):
        await asyncio.sleep(1)
        asyncio.get_running_loop()._virtual.clock += 34
        await asyncio.sleep(20)
        assert broadcaster.times == [0, 35, 40, 50]


@pytest.mark.parametrize(
    ("name", "value"),
    [("broadcaster", object()), ("broadcaster", None), ("citizen_id", ""), ("citizen_id", "a/b"), ("citizen_id", 7)]
    + [("interval", value) for value in (0, -1, float("nan"), float("inf"), "30", None)]
    + [("snapshot", {"a": 1})],
)
def test_wrong_arguments_are_named(name: str, value: object) -> None:
    arguments = {"broadcaster": Broadcaster(), "citizen_id": "ada", name: value}
    with pytest.raises(ConfigError, match=f"^{name}="):
        Heartbeat(**arguments)
