"""Clients whose sockets an ASGI server holds have the same sessions as those on the hub's own port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import urllib.error
import urllib.request

import pytest
import uvloop
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from asgi import Server, frame, subscribe, subscriber
from safe_broadcaster import BroadcasterClosed, ConfigError, ConnectRefused, EventBroadcaster
from support import event, eventually


class Door:
    """A hub, and an application of Starlette's that has it under ``/hub`` and endpoints of its own."""

    def __init__(self, **settings) -> None:
        self.hub = EventBroadcaster(port=0, **settings)
        self.errors: list[BaseException] = []
        self.before: list[str] = []
        self.app = Starlette(
            routes=[
                Mount("/hub", self.hub.asgi()),
                WebSocketRoute("/connect", self.endpoint),
                WebSocketRoute("/serve", self.serve),
                WebSocketRoute("/accepted", self.accepted),
            ]
        )

    async def endpoint(self, websocket) -> None:
        try:
            await self.hub.connect(websocket)
        except (ConnectRefused, BroadcasterClosed) as error:
            self.errors.append(error)
            return
        try:
            while True:
                await self.hub.handle_message(websocket, await websocket.receive_text())
        except WebSocketDisconnect:
            pass
        finally:
            await self.hub.disconnect(websocket)

    async def serve(self, websocket) -> None:
        await self.hub.serve(websocket, events=["alert.*"])

    async def accepted(self, websocket) -> None:
        await websocket.accept()
        await self.hub.register(websocket)
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                self.hub.record_ack(websocket, int(await websocket.receive_text()))
        await self.hub.unregister(websocket)

    @property
    def subscribers(self) -> int:
        return self.hub.get_stats()["subscribers"]


@pytest.fixture
async def door():
    door = Door()
    with Server(door.app) as server:
        door.server = server
        async with door.hub:
            yield door


def ask(server, path, body=None, headers=None, method=None):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", body, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


async def close_of(ws) -> int:
    """Read to the end; the code of the close."""
    try:
        while True:
            await frame(ws)
    except ConnectionClosed as closed:
        return closed.rcvd.code


async def test_a_mounted_hub_speaks_the_protocol_of_its_port(door) -> None:
    url = door.server.url("/hub/ws")
    async with connect(url, subprotocols=["sb.v1.json"]) as ws:
        assert ws.subprotocol == "sb.v1.json"
        position = await subscribe(ws, "alert.*")
        assert await door.hub.broadcast("alert.disk", 1) == 1
        assert await door.hub.broadcast("other", 1) == 0
        first = {"type": "event", "seq": 1, "prev": 0, "data": {"type": "alert.disk", "data": 1}}
        assert await frame(ws) == first
        await ws.send('{"type":"ping"}')
        told = {"epoch": door.hub.get_stats()["epoch"], "offset": 2}
        assert await frame(ws) == {"type": "pong", "lastSeq": 1, **told}
        await ws.send("nonsense")
        assert (await frame(ws))["data"]["code"] == "bad_frame"
        await ws.send(b"binary")
        assert (await frame(ws))["data"]["code"] == "bad_frame"
    async with connect(url) as ws:
        answer = await subscribe(ws, "alert.*", since={"epoch": position["epoch"], "offset": 0})
        assert (answer["recovered"], answer["replayed"]) == (True, 1)
        assert await frame(ws) == first | {"replay": True}
    await eventually(lambda: door.subscribers == 0)


async def test_an_emitter_delivers_through_the_mounted_hub(door, make) -> None:
    broadcaster = make(door.server.url("/hub/ws"))
    await broadcaster.start(10)
    async with subscriber(door.server.url("/hub/ws"), "*") as (ws, _):
        for n in range(300):
            await broadcaster.safe_emit(event(n))
        assert await broadcaster.safe_emit(event(300), durability="delivered")
        got = [(await frame(ws))["data"]["content"]["n"] for _ in range(301)]
        assert got == list(range(301))
    assert await broadcaster.drain(10)
    await broadcaster.stop()
    assert door.hub.get_stats()["events"] == 301


async def test_a_plain_publisher_and_http_publish_through_the_mounted_hub(door) -> None:
    async with (
        subscriber(door.server.url("/hub/ws"), "*") as (ws, _),
        connect(door.server.url("/hub/publish")) as publisher,
    ):
        await publisher.send('{"type":"a"}')
        await publisher.send("[]")
        assert (await frame(ws))["data"] == {"type": "a"}
        assert (await frame(publisher))["data"]["code"] == "bad_event"
        status, text, _ = await asyncio.to_thread(ask, door.server, "/hub/publish", b'{"type":"b"}')
        assert (status, text) == (200, '{"offset":2}')
        assert (await frame(ws))["data"] == {"type": "b"}
    status, text, _ = await asyncio.to_thread(ask, door.server, "/hub/publish", b"[]")
    assert status == 400
    assert "JSON object" in text


async def test_the_mounted_hub_answers_http_as_its_port_does(door) -> None:
    for path in ("/healthz", "/readyz", "/", "/nowhere", "/ws"):
        status, text, headers = await asyncio.to_thread(ask, door.server, f"/hub{path}")
        own = type("Own", (), {"port": door.hub.port})
        want_status, want_text, want_headers = await asyncio.to_thread(ask, own, path)
        assert (status, text) == (want_status, want_text), path
        for name in ("content-type", "cache-control", "x-content-type-options", "content-length"):
            assert headers.get(name) == want_headers.get(name), (path, name)
    status, text, _ = await asyncio.to_thread(ask, door.server, "/hub/stats")
    assert json.loads(text)["epoch"] == door.hub.get_stats()["epoch"]
    status, _, headers = await asyncio.to_thread(ask, door.server, "/hub/stats", method="DELETE")
    assert (status, headers["allow"]) == (405, "GET")
    status, text, _ = await asyncio.to_thread(ask, door.server, "/hub/healthz", method="HEAD")
    assert (status, text) == (200, "")


async def test_a_body_that_is_too_large_is_refused() -> None:
    door = Door(max_message_bytes=1024)
    with Server(door.app) as server:
        async with door.hub:
            status, text, _ = await asyncio.to_thread(ask, server, "/hub/publish", b'"' + b"x" * 5000 + b'"')
            assert (status, "max_message_bytes" in text) == (413, True)


async def test_pages_of_other_sites_are_refused_at_this_door_too(door) -> None:
    evil = "https://evil.example"
    for path in ("/hub/ws", "/hub/publish", "/connect"):
        with pytest.raises(InvalidStatus) as refused:
            await connect(door.server.url(path), origin=evil)
        assert refused.value.response.status_code == 403
    assert "allowed_origins" in str(door.errors[0])
    async with connect(door.server.url("/connect"), origin=f"http://127.0.0.1:{door.server.port}"):
        pass
    status, _, _ = await asyncio.to_thread(ask, door.server, "/hub/stats", headers={"Origin": evil})
    assert status == 403


async def test_a_wrong_subprotocol_path_or_a_full_or_stopped_hub_is_refused_with_its_status() -> None:
    door = Door(max_sessions=1)
    with Server(door.app) as server:
        with pytest.raises(InvalidStatus) as refused:
            await connect(server.url("/hub/ws"))
        assert refused.value.response.status_code == 503
        assert (await asyncio.to_thread(ask, server, "/hub/healthz"))[0] == 503
        async with door.hub:
            for path, protocols, status in (("/hub/ws", ["chat"], 400), ("/hub/x", None, 404)):
                with pytest.raises(InvalidStatus) as refused:
                    await connect(server.url(path), subprotocols=protocols)
                assert refused.value.response.status_code == status
            async with connect(server.url("/hub/ws")):
                await eventually(lambda: door.subscribers == 1)
                with pytest.raises(InvalidStatus) as refused:
                    await connect(server.url("/hub/ws"))
                assert refused.value.response.status_code == 503


async def test_who_is_connected_by_an_endpoint_gets_everything_until_it_subscribes(door) -> None:
    async with connect(door.server.url("/connect")) as ws:
        await eventually(lambda: door.subscribers == 1)
        await door.hub.broadcast("anything", 1)
        assert (await frame(ws))["data"]["type"] == "anything"
        assert (await subscribe(ws, "alert.*"))["events"] == ["alert.*"]
        await door.hub.broadcast("anything", 2)
        await door.hub.broadcast("alert.disk", 3)
        assert await frame(ws) == {"type": "event", "seq": 3, "prev": 1, "data": {"type": "alert.disk", "data": 3}}


async def test_serve_does_everything_until_the_client_is_gone(door) -> None:
    async with connect(door.server.url("/serve")) as ws:
        await eventually(lambda: door.subscribers == 1)
        await door.hub.broadcast("other", 1)
        await door.hub.broadcast("alert.x", 2)
        assert (await frame(ws))["seq"] == 2
        assert (await subscribe(ws, "other"))["events"] == ["other"]
    await eventually(lambda: door.subscribers == 0)


async def test_an_endpoint_may_accept_by_itself_and_record_acks(door) -> None:
    async with connect(door.server.url("/accepted")) as ws:
        await eventually(lambda: door.subscribers == 1)
        for n in range(5):
            await door.hub.broadcast("a", n)
            assert (await frame(ws))["seq"] == n + 1
        for sequence in (3, 2):
            await ws.send(str(sequence))
        await eventually(lambda: door.hub.get_stats()["acks"] == 2)
        client = door.hub.get_stats()["clients"][0]
        assert (client["acked"], client["lag"]) == (3, 2)
        await ws.send("6")
        assert "6" in (await frame(ws))["data"]["message"]


async def test_disconnect_closes_and_is_fine_twice(door) -> None:
    known = []
    connected = door.hub.connect

    async def remember(websocket) -> None:
        await connected(websocket)
        known.append((asyncio.get_running_loop(), websocket))

    door.hub.connect = remember
    async with connect(door.server.url("/connect")) as ws:
        await eventually(lambda: known)
        loop, websocket = known[0]
        for _ in range(2):
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(door.hub.disconnect(websocket), loop))
        with pytest.raises(ConnectionClosed) as closed:
            await frame(ws)
        assert closed.value.rcvd.code == 1000
    assert door.subscribers == 0


async def test_a_pattern_that_is_none_and_a_hub_that_is_stopped_are_told_to_the_endpoint() -> None:
    class Socket:
        def __init__(self) -> None:
            self.scope = {"type": "websocket", "headers": [], "path": "/"}

        async def accept(self, subprotocol=None) -> None: ...
        async def close(self, code=1000, reason=None) -> None: ...
        async def send(self, message) -> None: ...

    hub = EventBroadcaster(port=0)
    with pytest.raises(BroadcasterClosed):
        await hub.connect(Socket())
    async with hub:
        with pytest.raises(ConfigError, match="events=''"):
            await hub.connect(Socket(), events=[""])
        await eventually(lambda: hub.get_stats()["subscribers"] == 0)


async def test_the_hub_says_goodbye_through_this_door_too() -> None:
    door = Door()
    with Server(door.app) as server:
        await door.hub.start()
        async with subscriber(server.url("/hub/ws"), "*") as (ws, _):
            stopping = asyncio.create_task(door.hub.stop())
            assert (await frame(ws))["data"]["code"] == 3001
            with pytest.raises(ConnectionClosed) as closed:
                await frame(ws)
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (3001, "the hub stops")
            await stopping


def abort(ws) -> None:
    """End a client's connection with a TCP reset."""
    sock = ws.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ws.transport.abort()


def deaf_subscriber(port: int) -> socket.socket:
    """A client that subscribes to all, says so by an ack, and then reads nothing."""
    deaf = socket.create_connection(("127.0.0.1", port))
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.sendall(
        b"GET /hub/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert deaf.recv(4096).startswith(b"HTTP/1.1 101")
    for text in (b'{"type":"subscribe","data":{"events":["*"]}}', b'{"type":"ack","data":{"sequence":0}}'):
        deaf.sendall(bytes([0x81, 0x80 | len(text)]) + bytes(4) + text)
    return deaf


@pytest.mark.parametrize("path", ["/hub/ws", "/connect"])
async def test_a_client_that_vanishes_amid_a_flood_leaves_nothing_behind(door, path) -> None:
    async with subscriber(door.server.url("/hub/ws"), "*") as (stays, _):
        vanishes = await connect(door.server.url(path))
        await subscribe(vanishes, "*")
        text = "x" * 2000
        for n in range(200):
            await door.hub.broadcast("flood", [n, text])
            if n == 50:
                abort(vanishes)
        assert [(await frame(stays))["seq"] for _ in range(200)] == list(range(1, 201))
        await eventually(lambda: door.subscribers == 1)


async def test_a_client_that_reads_nothing_is_closed_as_slow_and_holds_nothing_up() -> None:
    door = Door(session_queue_bytes=64 << 10)
    with Server(door.app) as server:
        async with door.hub, subscriber(server.url("/hub/ws"), "*") as (quick, _):
            slow = await asyncio.to_thread(deaf_subscriber, server.port)
            await eventually(lambda: door.hub.get_stats()["acks"] == 1)
            text, sent = "x" * 20_000, 0
            while door.hub.get_stats()["slow"] == 0:
                await door.hub.broadcast("flood", text)
                sent += 1
                assert (await frame(quick))["seq"] == sent
                assert sent < 5000, "the sockets took 100 MB"
            # The session is over although the server still hangs on the client.
            await eventually(lambda: door.subscribers == 1, 20)
            slow.close()


async def test_messages_that_are_too_large_are_told_with_the_close(door) -> None:
    async with connect(door.server.url("/hub/ws")) as ws:
        await ws.send("x" * (600 << 10))
        with pytest.raises(ConnectionClosed) as closed:
            await frame(ws)
        assert closed.value.rcvd.code == 3502


async def test_silence_is_pinged_in_the_clients_own_words() -> None:
    door = Door(ping_interval=1.0)
    with Server(door.app) as server:
        async with door.hub, subscriber(server.url("/hub/ws"), "*") as (ws, _):
            epoch = door.hub.get_stats()["epoch"]
            assert await frame(ws) == {"type": "ping", "lastSeq": 0, "epoch": epoch, "offset": 0}
            await door.hub.broadcast("a", 1)
            assert (await frame(ws))["seq"] == 1
            for _ in range(3):  # it is not taken for dead, though it answers nothing
                assert await frame(ws) == {"type": "ping", "lastSeq": 1, "epoch": epoch, "offset": 1}


async def test_who_only_publishes_is_not_taken_for_dead_in_its_silence(make) -> None:
    door = Door(ping_interval=0.3)
    with Server(door.app) as server:
        async with door.hub, connect(server.url("/hub/publish")) as publisher:
            broadcaster = make(server.url("/hub/ws"))
            await broadcaster.start(10)
            async with subscriber(server.url("/hub/ws"), "*") as (ws, _):
                for _ in range(5):  # so many intervals go by in which nobody but the subscriber is pinged
                    assert (await frame(ws))["type"] == "ping"
            assert await broadcaster.safe_emit(event(0), durability="delivered")
            await publisher.send("{}")
            await eventually(lambda: door.hub.get_stats()["events"] == 2)
            assert broadcaster.get_stats()["reconnects"] == 0
            assert door.hub.get_stats()["closes"] == {}
            await broadcaster.stop()


async def test_several_servers_and_loops_share_a_hub_also_under_uvloop() -> None:
    door = Door()
    with Server(door.app, loop="asyncio") as one, Server(door.app, loop="uvloop") as other:
        async with (
            door.hub,
            subscriber(one.url("/hub/ws"), "*") as (first, _),
            subscriber(other.url("/connect"), "*") as (second, _),
            subscriber(door.hub.url, "*") as (third, _),
        ):
            for n in range(100):
                assert await door.hub.broadcast("a", n) == 3
            for ws in (first, second, third):
                assert [(await frame(ws))["seq"] for _ in range(100)] == list(range(1, 101))


def test_a_hub_that_lives_in_uvloop_serves_itself() -> None:
    async def main() -> None:
        door = Door()
        with Server(door.app, loop="uvloop") as server:
            async with door.hub, subscriber(server.url("/hub/ws"), "*") as (ws, _):
                await door.hub.broadcast("a", 1)
                assert (await frame(ws))["seq"] == 1

    uvloop.run(main())


async def test_as_the_root_application_it_starts_and_stops_with_the_server() -> None:
    hub = EventBroadcaster(port=0)
    with Server(hub.asgi()) as server:
        assert hub.is_listener_healthy()
        async with subscriber(server.url("/ws"), "*") as (ws, _):
            done = threading.Thread(target=server.stop)
            done.start()
            assert await close_of(ws) in {1001, 1012, 3001}
            await asyncio.to_thread(done.join)
    assert not hub.get_stats()["running"]


@pytest.mark.filterwarnings("ignore")  # the first of them is deprecated by both uvicorn and websockets
@pytest.mark.parametrize("ws", ["websockets", "websockets-sansio", "wsproto"])
async def test_every_websocket_layer_of_uvicorn_will_do(ws) -> None:
    door = Door()
    with Server(door.app, ws=ws) as server:
        async with door.hub, subscriber(server.url("/hub/ws"), "*") as (client, _):
            await door.hub.broadcast("a", "x" * 100_000)
            assert len((await frame(client))["data"]["data"]) == 100_000
            stopping = asyncio.create_task(door.hub.stop())
            assert await close_of(client) == 3001
            await stopping


@pytest.mark.timeout(180)
async def test_a_thousand_sessions_get_every_event_in_order() -> None:
    door = Door()
    with Server(door.app, ws_ping_interval=None, backlog=2048) as server:
        async with door.hub, contextlib.AsyncExitStack() as stack:
            url = server.url("/hub/ws")
            clients = []
            for _ in range(20):
                opened = [connect(url, ping_interval=None, compression=None, open_timeout=60) for _ in range(50)]
                clients += await asyncio.gather(*(stack.enter_async_context(each) for each in opened))
            await asyncio.gather(*(subscribe(client, "*") for client in clients))
            assert door.subscribers == 1000
            for n in range(20):
                assert await door.hub.broadcast("a", n) == 1000

            async def seqs(client) -> list[int]:
                return [json.loads(await client.recv())["seq"] for _ in range(20)]

            got = await asyncio.wait_for(asyncio.gather(*(seqs(client) for client in clients)), 120)
            assert all(each == list(range(1, 21)) for each in got)
            for client in clients:
                abort(client)
            await eventually(lambda: door.subscribers == 0, 60)
