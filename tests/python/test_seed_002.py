"""Calling code of an application that broadcasts from its event bus works as it is written; only the imports differ."""

from __future__ import annotations

import json
import logging

import pytest
from fastapi import FastAPI, WebSocket
from pydantic import BaseModel
from websockets.asyncio.client import connect

from asgi import Server
from safe_broadcaster import EventBroadcaster
from safe_broadcaster.bus import (
    AlertNotifier,
    ConnectionManager,
    ControlLimitsUpdatedEvent,
    EventBus,
    SampleProcessedEvent,
    ViolationAcknowledged,
    ViolationCreated,
    WebSocketBroadcaster,
    alert_manager,
    event_bus,
)
from safe_broadcaster.bus import manager as ws_manager
from safe_broadcaster.exceptions import ConfigError
from support import eventually
from virtual import virtual


@pytest.fixture
def broadcaster():
    broadcaster = WebSocketBroadcaster(ws_manager, event_bus)
    yield broadcaster
    broadcaster.stop()


@pytest.fixture
def server(broadcaster):
    app = FastAPI()

    @app.websocket("/ws")
    async def websocket(websocket: WebSocket) -> None:
        await ws_manager.serve(websocket)

    with Server(app) as server:
        yield server


def flow(events):
    """Each event, the type of its message, and whether it goes to everyone."""
    sample, created, seen, limits = events
    return [(sample, "sample", False), (created, "violation", False), (seen, "ack_update", True),
            (limits, "control_limits", False)]  # fmt: skip


EVENTS = [
    SampleProcessedEvent(characteristic_id=5, sample_id=1, mean=9.98),
    ViolationCreated(characteristic_id=5, violation_id=2, sample_id=1),
    ViolationAcknowledged(violation_id=2, user="ada"),
    ControlLimitsUpdatedEvent(characteristic_id=5, center_line=10.0, ucl=10.3, lcl=9.7),
]


async def test_events_flow_from_the_bus_to_the_clients_that_they_concern(server) -> None:
    async with connect(server.url("/ws")) as subscriber, connect(server.url("/ws")) as other:
        await subscriber.send(json.dumps({"type": "subscribe", "characteristic_ids": [5]}))
        await other.send(json.dumps({"type": "subscribe", "characteristic_ids": [6]}))
        assert json.loads(await subscriber.recv())["type"] == "subscribed"
        assert json.loads(await other.recv())["type"] == "subscribed"
        for event in EVENTS:
            await event_bus.publish(event)
        for event, kind, to_all in flow(EVENTS):
            message = json.loads(await subscriber.recv())
            assert set(message) == {"type", "payload"}
            assert message["type"] == kind
            for field in ("characteristic_id", "violation_id", "sample_id", "mean", "ucl", "user"):
                assert message["payload"].get(field) == getattr(event, field, None)
            if to_all:
                assert json.loads(await other.recv()) == message
        await event_bus.publish(SampleProcessedEvent(characteristic_id=6, sample_id=9, mean=1.0))
        last = json.loads(await other.recv())
        assert last["payload"]["sample_id"] == 9, "it had heard nothing of characteristic 5"


async def test_the_troubleshooting_calls_work(broadcaster, caplog) -> None:
    assert event_bus.get_handler_count(SampleProcessedEvent) == 1
    assert ws_manager.get_connection_count() == 0
    assert len(event_bus._running_tasks) == 0
    logging.getLogger("safe_broadcaster.bus.broadcaster").setLevel(logging.DEBUG)
    try:
        await event_bus.publish(EVENTS[0])
        await event_bus.drain()
        assert "broadcast sample to characteristic: 0 clients" in caplog.text
    finally:
        logging.getLogger("safe_broadcaster.bus.broadcaster").setLevel(logging.NOTSET)


async def test_a_new_notifier_is_a_class_with_two_methods() -> None:
    sent = []

    class EmailNotifier(AlertNotifier):
        async def notify_violation_created(self, event: ViolationCreated) -> None:
            sent.append(event)

        async def notify_violation_acknowledged(self, event: ViolationAcknowledged) -> None:
            sent.append(event)

    email_notifier = EmailNotifier()
    alert_manager.add_notifier(email_notifier)
    try:
        for event in EVENTS[1:3]:
            await event_bus.publish(event)
        await event_bus.drain()
        assert sent == EVENTS[1:3]
    finally:
        alert_manager.remove_notifier(email_notifier)


class Recorder(ConnectionManager):
    """Keeps messages instead of sending them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[object, dict]] = []

    async def broadcast(self, message) -> int:
        self.messages.append(("all", message))
        return 1

    async def broadcast_to_characteristic(self, characteristic_id, message) -> int:
        self.messages.append((characteristic_id, message))
        return 1


@virtual
async def test_a_broadcaster_that_fails_does_not_affect_the_publisher_or_other_handlers(caplog) -> None:
    class Failing(Recorder):
        async def broadcast_to_characteristic(self, characteristic_id, message) -> int:
            raise RuntimeError("no connection manager")

    bus, heard = EventBus(), []

    async def on_sample(event: SampleProcessedEvent) -> None:
        heard.append(event)

    manager = Failing()
    broadcaster = WebSocketBroadcaster(manager, bus)
    bus.subscribe(SampleProcessedEvent, on_sample)
    for event in EVENTS:
        assert await bus.publish(event) >= 1
    await bus.drain()
    assert heard == EVENTS[:1]
    assert [destination for destination, _ in manager.messages] == ["all"]
    failures = [record for record in caplog.records if record.name == "safe_broadcaster.bus.broadcaster"]
    assert len(failures) == 3
    await broadcaster.notify_violation_created(EVENTS[1])  # called by hand it raises nothing either


@virtual
async def test_events_of_other_classes_find_their_way_by_a_route() -> None:
    class Temperature(BaseModel):
        characteristic_id: int
        celsius: float

    class Hot(Temperature):
        pass

    bus, manager = EventBus(), Recorder()
    broadcaster = WebSocketBroadcaster(manager, bus)
    broadcaster.route(Temperature, "temperature")
    broadcaster.route(Hot, "alarm", to="all", payload=lambda event: {"celsius": event.celsius})
    await bus.publish(Temperature(characteristic_id=3, celsius=20.5))
    await bus.publish(Hot(characteristic_id=3, celsius=99.0))
    await bus.drain()
    assert manager.messages == [
        (3, {"type": "temperature", "payload": {"characteristic_id": 3, "celsius": 20.5}}),
        ("all", {"type": "alarm", "payload": {"celsius": 99.0}}),
    ]
    broadcaster.stop()
    assert bus.get_handler_count() == 0
    await bus.publish(EVENTS[0])
    await bus.drain()
    assert len(manager.messages) == 2


@virtual
async def test_an_event_without_a_characteristic_is_told_in_the_log(caplog) -> None:
    bus, manager = EventBus(), Recorder()
    WebSocketBroadcaster(manager, bus).route(dict, "anything")
    await bus.publish({"a": 1})
    await bus.publish({"characteristic_id": 0})
    await bus.drain()
    assert manager.messages == [(0, {"type": "anything", "payload": {"characteristic_id": 0}})]
    assert "an event dict could not be broadcast" in caplog.text


@pytest.mark.parametrize("wrong", [None, object(), EventBroadcaster(port=0)])
def test_a_manager_that_cannot_send_to_subscribers_is_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=r"ws_manager=.* is not allowed: it has no broadcast"):
        WebSocketBroadcaster(wrong, EventBus())


@pytest.mark.parametrize("wrong", [{"to": "nobody"}, {"payload": 7}])
def test_a_wrong_route_is_named(wrong) -> None:
    broadcaster = WebSocketBroadcaster(Recorder(), EventBus())
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}=.* is not allowed"):
        broadcaster.route(dict, "anything", **wrong)


async def test_batches_spare_frames_at_high_frequency() -> None:
    manager, bus = ConnectionManager(batch_interval=0.05, queue_size=2000), EventBus(queue_size=2000)
    WebSocketBroadcaster(manager, bus)
    app = FastAPI()

    @app.websocket("/ws")
    async def websocket(websocket: WebSocket) -> None:
        await manager.serve(websocket)

    with Server(app) as server:
        async with connect(server.url("/ws")) as client:
            await client.send(json.dumps({"type": "subscribe", "characteristic_ids": [5]}))
            assert json.loads(await client.recv())["type"] == "subscribed"
            for n in range(1000):
                await bus.publish(SampleProcessedEvent(characteristic_id=5, sample_id=n, mean=1.0))
            frames, samples = 0, []
            while len(samples) < 1000:
                message = json.loads(await client.recv())
                frames += 1
                samples += message["payload"] if message["type"] == "batch" else [message]
            assert [sample["payload"]["sample_id"] for sample in samples] == list(range(1000))
            assert frames < 100
        await eventually(lambda: manager.get_connection_count() == 0)
