"""The hub from Python: its settings, its port, its sessions."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import urllib.error
import urllib.request

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from safe_broadcaster import _core
from safe_broadcaster.exceptions import (
    BroadcasterClosed,
    ConfigError,
    ConnectRefused,
    EventNotSerializable,
    EventTooLarge,
    ForkedProcess,
)
from safe_broadcaster.hub import EventBroadcaster, HubConfig


@pytest.fixture
async def hub():
    async with EventBroadcaster(port=0) as running:
        yield running


async def subscribe(ws, *events, since=None):
    data = {"events": list(events)}
    if since is not None:
        data["since"] = since
    await ws.send(json.dumps({"type": "subscribe", "data": data}))
    return json.loads(await ws.recv())


async def request(hub, path, body=None, headers=None):
    """Status and body of an HTTP request, made in a thread."""

    def ask():
        url = f"http://127.0.0.1:{hub.port}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers or {})) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


async def test_what_is_broadcast_reaches_those_who_asked_for_it(hub):
    async with connect(hub.url) as all_events, connect(hub.url, subprotocols=["sb.v1.json"]) as alerts:
        assert alerts.subprotocol == "sb.v1.json"
        position = await subscribe(all_events, "*")
        assert position["events"] == ["*"]
        await subscribe(alerts, "alert.*")
        assert await hub.broadcast("alert.disk", {"free": 0.02}, topic="host/a") == 2
        assert await hub.broadcast_event({"type": "other"}) == 1
        want = {"type": "event", "seq": 1, "prev": 0}
        event = {"type": "alert.disk", "data": {"free": 0.02}, "topic": "host/a"}
        assert json.loads(await alerts.recv()) == want | {"data": event}
        assert json.loads(await all_events.recv()) == want | {"data": event}
        assert json.loads(await all_events.recv())["data"] == {"type": "other"}


async def test_who_comes_back_recovers_what_was_missed(hub):
    async with connect(hub.url) as ws:
        position = await subscribe(ws, "a")
    await hub.broadcast("a", 1)
    await hub.broadcast("b", 2)
    async with connect(hub.url) as ws:
        since = {"epoch": position["epoch"], "offset": position["offset"]}
        answer = await subscribe(ws, "a", since=since)
        assert (answer["recovered"], answer["replayed"]) == (True, 1)
        frame = json.loads(await ws.recv())
        assert frame == {"type": "event", "seq": 1, "prev": 0, "replay": True, "data": {"type": "a", "data": 1}}


async def test_an_event_is_published_over_http(hub):
    async with connect(hub.url) as ws:
        await subscribe(ws, "x")
        assert await request(hub, "/publish", b'{"type":"x"}') == (200, '{"offset":1}')
        assert json.loads(await ws.recv())["data"] == {"type": "x"}
    status, text = await request(hub, "/publish", b"[]")
    assert status == 400
    assert "JSON object" in text


async def test_pages_of_other_sites_are_refused(hub):
    assert (await request(hub, "/stats", headers={"Origin": "https://evil.example"}))[0] == 403
    with pytest.raises(InvalidStatus) as refused:
        await connect(hub.url, origin="https://evil.example")
    assert refused.value.response.status_code == 403
    origin = "https://dash.example"
    async with (
        EventBroadcaster(port=0, allowed_origins=[origin]) as open_hub,
        connect(open_hub.url, origin=origin) as ws,
    ):
        assert (await subscribe(ws, "*"))["action"] == "subscribed"


async def test_the_numbers_are_the_same_inside_and_outside(hub):
    async with connect(hub.url) as ws:
        await subscribe(ws, "*")
        await hub.broadcast("a", 1)
        await ws.recv()
        stats = hub.get_stats()
        assert (stats["running"], stats["port"], stats["subscribers"]) == (True, hub.port, 1)
        assert (stats["offset"], stats["events"], stats["delivered"], stats["log_events"]) == (1, 1, 1, 1)
        status, text = await request(hub, "/stats")
        assert status == 200
        assert json.loads(text) | {"uptime": 0} == {
            key: value for key, value in stats.items() if key not in {"running", "port", "clients"}
        } | {"uptime": 0}


async def test_the_port_serves_health_and_a_page():
    async with EventBroadcaster(port=0, page="<p>dashboard</p>") as hub:
        assert await request(hub, "/healthz") == (200, "ok\n")
        assert await request(hub, "/readyz") == (200, "ok\n")
        assert await request(hub, "/") == (200, "<p>dashboard</p>")
        assert (await request(hub, "/nowhere"))[0] == 404


async def test_readiness_is_an_event(hub):
    async with connect(hub.url) as ws:
        await subscribe(ws, "bus.*")
        assert await hub.publish_ready() == 1
        event = json.loads(await ws.recv())["data"]
        assert event["type"] == "bus.ready"
        assert event["data"]["service"] == "event_broadcaster"


async def test_stop_says_goodbye_and_a_new_start_has_a_new_epoch():
    hub = EventBroadcaster(port=0)
    assert not hub.is_listener_healthy()
    assert hub.get_stats() == {"running": False, "port": 0}
    await hub.start()
    await hub.start()
    port, epoch = hub.port, hub.get_stats()["epoch"]
    assert hub.is_listener_healthy()
    async with connect(hub.url) as ws:
        await subscribe(ws, "*")
        stopping = asyncio.create_task(hub.stop())
        assert json.loads(await ws.recv())["data"]["code"] == 3001
        with pytest.raises(ConnectionClosed) as closed:
            await ws.recv()
        assert closed.value.rcvd.code == 3001
        await stopping
    assert not hub.is_listener_healthy()
    assert not hub.get_stats()["running"]
    with pytest.raises(BroadcasterClosed):
        await hub.broadcast("a", 1)
    await hub.stop()
    await hub.start()
    assert hub.get_stats()["epoch"] != epoch
    assert hub.port != 0
    assert port != 0
    await hub.stop()


async def test_the_client_of_the_same_process_waits_for_the_hub():
    hub = EventBroadcaster(port=0)
    client = hub.client
    assert isinstance(client.core, _core.HubClient)
    assert not client.is_available()
    with pytest.raises(ConnectRefused):
        await client.connect()
    waiting = asyncio.create_task(client.wait_until_ready())
    await hub.start()
    await waiting
    await client.connect()
    await client.send({"type": "x"})
    assert hub.get_stats()["events"] == 1
    await hub.stop()
    assert not client.is_available()
    with pytest.raises(BroadcasterClosed):
        await client.send({"type": "x"})


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ([1], EventNotSerializable),
        ("text", EventNotSerializable),
        ({"a": object()}, EventNotSerializable),
        ({"type": 3}, EventNotSerializable),
        ({1: 2}, EventNotSerializable),
        ({"a": "x" * 2000}, EventTooLarge),
    ],
)
async def test_what_cannot_be_sent_is_refused(event, error):
    async with EventBroadcaster(port=0, max_message_bytes=1024) as hub:
        with pytest.raises(error):
            await hub.broadcast_event(event)
        assert hub.get_stats()["events"] == 0


async def test_threads_may_publish_while_the_loop_does(hub):
    core = hub._core
    threads = [threading.Thread(target=lambda: [core.publish(b"{}") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        await hub.broadcast_event({})
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert hub.get_stats()["offset"] == 2500


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"colour": "red"}, ["colour='red'", "no such setting", "replay_events"]),
        ({"port": 70000}, ["port=70000", "0 to 65535"]),
        ({"port": "http"}, ["port='http'", "0 to 65535"]),
        ({"host": ""}, ["host=''", "IP address"]),
        ({"replay_events": -1}, ["replay_events=-1", "whole number"]),
        ({"replay_age": 0}, ["replay_age=0", "more than 0"]),
        ({"replay_age": float("nan")}, ["replay_age=NaN", "number of seconds"]),
        ({"session_queue_bytes": 1}, ["session_queue_bytes=1", "4096"]),
        ({"slow": "never"}, ["slow='never'", "drop_with_gap"]),
        ({"compression_threshold": 1}, ["compression_threshold=1", "64 to"]),
        ({"compression_threshold": "1k"}, ["compression_threshold='1k'", "or None"]),
        ({"max_sessions": 0}, ["max_sessions=0", "1 to 1000000"]),
        ({"ping_interval": 0}, ["ping_interval=0", "0.1 to 3600"]),
        ({"allowed_origins": "https://one.example"}, ["allowed_origins='https://one.example'", "sequence"]),
        ({"allowed_origins": ["one.example"]}, ["'one.example'", "https://host"]),
        ({"requires_ack": ["alert.*", ""]}, ["requires_ack=''", "empty"]),
        ({"requires_ack": [".".join("a" * 33)]}, ["requires_ack='a.a", "32 segments"]),
        ({"envelope": "none"}, ["envelope='none'", "'event' or 'raw'"]),
        ({"entity_keys": {"ids": "id"}}, ["entity_keys={'ids': 'id'}", "{id}"]),
        ({"entity_keys": ["ids"]}, ["entity_keys=['ids']", "a mapping"]),
    ],
)
async def test_a_wrong_setting_is_named_with_what_is_allowed(settings, words):
    with pytest.raises(ConfigError) as refused:
        await EventBroadcaster(**({"port": 0} | settings)).start()
    for word in words:
        assert word in str(refused.value)


async def test_an_address_in_use_is_named_with_the_remedy(hub):
    with pytest.raises(ConnectRefused, match=re.escape(f"127.0.0.1:{hub.port}") + ".*another port"):
        await EventBroadcaster(port=hub.port).start()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of fork beside threads
async def test_a_forked_child_is_refused_and_the_parent_goes_on(hub):
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (hub.get_stats, lambda: hub._core.publish(b"{}")):
            try:
                use()
            except ForkedProcess:
                refused += 1
        os._exit(refused)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert await hub.broadcast_event({"type": "x"}) == 0
    assert hub.get_stats()["offset"] == 1


def test_urls_can_be_connected_to():
    assert EventBroadcaster(port=1234).url == "ws://127.0.0.1:1234/ws"
    assert EventBroadcaster(host="0.0.0.0", port=1).url == "ws://127.0.0.1:1/ws"
    assert EventBroadcaster(host="::1", port=1).url == "ws://[::1]:1/ws"


async def test_defaults_of_the_dataclass_are_allowed():
    core = _core.Hub()
    assert core.stats() is None
    port = core.start(HubConfig(port=0))
    assert port > 0
