"""Calling code of the hub that users run today works as it is written; only the import and Redis differ."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from asgi import Server, frame, subscribe
from safe_broadcaster import (
    BroadcastRetryMetrics,
    EventBroadcaster,
    WebSocketAlertEventType,
    WebSocketCircuitBreaker,
    broadcast_with_retry,
    get_broadcaster,
    stop_broadcaster,
)
from safe_broadcaster.retry import DEFAULT_BASE_DELAY, DEFAULT_MAX_DELAY, DEFAULT_MAX_RETRIES
from support import eventually

ANY: dict[str, Any] = {"port": 0}
redis_client = None


def application(broadcaster: EventBroadcaster) -> FastAPI:
    """An endpoint as users of the seed have it: connect, loop on receive_text, record acks, disconnect."""
    app = FastAPI()

    @app.websocket("/ws/events")
    async def websocket_events(websocket: WebSocket) -> None:
        await broadcaster.connect(websocket)
        try:
            while True:
                text = await websocket.receive_text()
                message = json.loads(text)
                if message["type"] == "ack":
                    broadcaster.record_ack(websocket, message["data"]["sequence"])
                else:
                    await broadcaster.handle_message(websocket, text)
        except WebSocketDisconnect:
            pass
        finally:
            await broadcaster.disconnect(websocket)

    @app.websocket("/ws/registered")
    async def websocket_registered(websocket: WebSocket) -> None:
        await websocket.accept()
        await broadcaster.register(websocket)
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            await broadcaster.unregister(websocket)

    return app


@pytest.fixture
async def broadcaster():
    async with EventBroadcaster(redis_client, **ANY) as broadcaster:
        yield broadcaster


@pytest.fixture
def server(broadcaster):
    with Server(application(broadcaster)) as server:
        yield server


async def test_context_manager_starts_and_stops_and_broadcast_event_returns_a_count() -> None:
    event_data = {"type": "event", "data": {"id": 1, "risk_score": 75}}
    async with EventBroadcaster(redis_client, **ANY) as broadcaster:
        # broadcaster is started and listening
        assert await broadcaster.broadcast_event(event_data) == 0
        assert broadcaster.is_listener_healthy()
    # broadcaster is automatically stopped
    assert not broadcaster.is_listener_healthy()


async def test_constructor_takes_a_channel_name_by_position() -> None:
    assert EventBroadcaster(None, "security_events").channel_name == "security_events"


async def test_start_twice_is_one_start(broadcaster) -> None:
    port = broadcaster.port
    await broadcaster.start()
    assert broadcaster.port == port


async def test_message_flow_subscribe_event_ack_ping(server, broadcaster) -> None:
    async with connect(server.url("/ws/events")) as ws:
        await eventually(lambda: broadcaster.get_stats()["subscribers"] == 1)
        await ws.send('{"type": "subscribe", "data": {"events": ["alert.*", "detection.*"]}}')
        confirmed = await frame(ws)
        assert confirmed["action"] == "subscribed"
        assert confirmed["events"] == ["alert.*", "detection.*"]
        await broadcaster.broadcast_alert({"id": 7}, WebSocketAlertEventType.ALERT_CREATED)
        await broadcaster.broadcast_scene_change({"camera_id": "c1"})
        event = await frame(ws)
        assert (event["type"], event["data"]) == ("event", {"type": "alert.created", "data": {"id": 7}})
        await ws.send(json.dumps({"type": "ack", "data": {"sequence": event["seq"]}}))
        await eventually(lambda: broadcaster.get_stats()["clients"][0]["acked"] == event["seq"])
        assert broadcaster.get_stats()["clients"][0]["lag"] == 0
        await ws.send('{"type": "pong"}')
        await ws.send('{"type": "ping"}')
        assert (await frame(ws)).items() >= {"type": "pong", "lastSeq": event["seq"]}.items()
    await eventually(lambda: broadcaster.get_stats()["subscribers"] == 0)


async def test_register_and_unregister_of_an_accepted_socket_send_everything(server, broadcaster) -> None:
    async with connect(server.url("/ws/registered")) as ws:
        await eventually(lambda: broadcaster.get_stats()["subscribers"] == 1)
        await broadcaster.broadcast_event({"type": "event", "data": {"id": 1}})
        assert (await frame(ws))["data"] == {"type": "event", "data": {"id": 1}}


async def test_clients_that_fail_are_cleaned_up_and_the_others_get_on(server, broadcaster) -> None:
    async with connect(server.url("/ws/events")) as stays:
        gone = await connect(server.url("/ws/events"))
        await eventually(lambda: broadcaster.get_stats()["subscribers"] == 2)
        gone.transport.abort()
        for n in range(50):
            await broadcaster.broadcast_event({"type": "event", "data": {"id": n}})
        assert [(await frame(stays))["data"]["data"]["id"] for _ in range(50)] == list(range(50))
        await eventually(lambda: broadcaster.get_stats()["subscribers"] == 1)


TYPED = [
    ("broadcast_service_status", ({"service": "redis", "status": "healthy"},), "service_status"),
    ("broadcast_scene_change", ({"id": 1},), "scene_change"),
    ("broadcast_camera_status", ({"camera_id": "c1", "status": "online"},), "camera_status"),
    ("broadcast_worker_status", ({"worker_name": "detector"},), "worker_status"),
    ("broadcast_detection_new", ({"detection_id": 1},), "detection.new"),
    ("broadcast_detection_batch", ({"batch_id": "b"},), "detection.batch"),
    ("broadcast_infrastructure_alert", ({"alertname": "x"},), "infrastructure_alert"),
    ("broadcast_alert", ({"id": 1}, WebSocketAlertEventType.ALERT_RESOLVED), "alert.resolved"),
    ("broadcast_alert", ({"id": 1}, "alert.custom"), "alert.custom"),
]


@pytest.mark.parametrize(("method", "arguments", "kind"), TYPED)
async def test_each_broadcast_method_sends_its_type_and_counts_who_gets_it(
    broadcaster, method, arguments, kind
) -> None:
    async with connect(broadcaster.url) as ws:
        await subscribe(ws, kind)
        assert await getattr(broadcaster, method)(*arguments) == 1
        assert (await frame(ws))["data"] == {"type": kind, "data": arguments[0]}
        # A whole event is taken as it is.
        whole = {"type": kind, "data": arguments[0], "timestamp": "2026-01-01T00:00:00Z"}
        assert await getattr(broadcaster, method)(whole, *arguments[1:]) == 1
        assert (await frame(ws))["data"] == whole


async def test_summary_update_takes_either_or_both(broadcaster) -> None:
    async with connect(broadcaster.url) as ws:
        await subscribe(ws, "summary_update")
        assert await broadcaster.broadcast_summary_update(hourly={"n": 1}) == 1
        assert await broadcaster.broadcast_summary_update(hourly={"n": 1}, daily={"n": 9}) == 1
        assert (await frame(ws))["data"]["data"] == {"hourly": {"n": 1}, "daily": None}
        assert (await frame(ws))["data"]["data"] == {"hourly": {"n": 1}, "daily": {"n": 9}}


async def test_get_messages_since_replays_what_came_after_a_sequence(broadcaster) -> None:
    assert broadcaster.get_messages_since(0) == []
    for n in range(5):
        await broadcaster.broadcast_event({"type": "event", "data": {"id": n}})
    messages = broadcaster.get_messages_since(2)
    assert [message["seq"] for message in messages] == [3, 4, 5]
    assert messages[0] == {"type": "event", "seq": 3, "prev": 2, "data": {"type": "event", "data": {"id": 2}}}
    marked = broadcaster.get_messages_since(2, mark_as_replay=True)
    assert marked == [{**message, "replay": True} for message in messages]
    assert broadcaster.get_messages_since(5) == broadcaster.get_messages_since(99) == []
    assert [message["seq"] for message in broadcaster.get_messages_since(-1, limit=2)] == [1, 2]


async def test_get_messages_since_is_bounded_by_the_buffer() -> None:
    async with EventBroadcaster(redis_client, replay_events=100, **ANY) as broadcaster:
        for n in range(130):
            await broadcaster.broadcast_event({"type": "event", "data": {"id": n}})
        assert [message["seq"] for message in broadcaster.get_messages_since(0)] == list(range(31, 131))


async def test_broadcast_with_retry_wraps_a_broadcast_and_records_metrics(broadcaster) -> None:
    metrics = BroadcastRetryMetrics()
    count = await broadcast_with_retry(
        lambda: broadcaster.broadcast_event({"type": "event", "data": {}}),
        "event",
        max_retries=DEFAULT_MAX_RETRIES,
        base_delay=DEFAULT_BASE_DELAY,
        max_delay=DEFAULT_MAX_DELAY,
        metrics=metrics,
    )
    assert count == 0
    assert metrics.to_dict()["successful_broadcasts"] == 1
    assert metrics.retry_counts == {0: 1, 1: 0, 2: 0, 3: 0}


async def test_metrics_states_and_health_checks_have_the_seeds_shape(broadcaster) -> None:
    assert set(broadcaster.get_broadcast_metrics()) >= {
        "total_attempts", "successful_broadcasts", "failed_broadcasts", "retries_exhausted", "retry_counts",
    }  # fmt: skip
    assert broadcaster.get_circuit_state().value == "closed"
    assert broadcaster.is_listener_healthy() is True
    assert broadcaster.is_degraded() is False


async def test_the_breaker_takes_the_seeds_arguments() -> None:
    breaker = WebSocketCircuitBreaker(
        failure_threshold=5,
        recovery_timeout=30.0,
        half_open_max_calls=1,
        success_threshold=1,
        name="event_broadcaster",
    )
    assert breaker.get_state().value == "closed"
    breaker.record_success()


async def test_get_broadcaster_gives_one_instance_until_it_is_stopped() -> None:
    broadcaster = await get_broadcaster(redis_client)
    try:
        assert await get_broadcaster(redis_client) is broadcaster
        assert broadcaster.is_listener_healthy()
    finally:
        await stop_broadcaster()
    assert not broadcaster.is_listener_healthy()


async def test_a_stopped_broadcaster_closes_its_clients(broadcaster, server, caplog) -> None:
    caplog.set_level(logging.ERROR)
    async with connect(server.url("/ws/events")) as ws:
        await eventually(lambda: broadcaster.get_stats()["subscribers"] == 1)
        stopping = asyncio.create_task(broadcaster.stop())
        assert (await frame(ws))["type"] == "bye"
        with pytest.raises(ConnectionClosed):
            await frame(ws)
        await stopping
    assert caplog.records == []
