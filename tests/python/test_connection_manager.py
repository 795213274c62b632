"""Clients of an application's own sockets: subscriptions, bounds, pings, and no client that harms another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from uuid import UUID

import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from asgi import Server, subscriber
from safe_broadcaster import ConfigError, ConnectionManager, ConnectRefused, EventBroadcaster, EventNotSerializable
from support import eventually
from virtual import now, virtual


class Socket:
    """A client's socket as a server gives it: may hang on what it sends, or be gone."""

    def __init__(self) -> None:
        self.accepted = 0
        self.sent: list[dict] = []
        self.closed: tuple[int, str | None] | None = None
        self.reads = asyncio.Event()
        self.reads.set()
        self.gone = False

    async def accept(self) -> None:
        self.accepted += 1

    async def send_text(self, data: str) -> None:
        await self.reads.wait()
        if self.gone:
            raise RuntimeError("Cannot call send once a close message has been sent")
        self.sent.append(json.loads(data))

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        self.closed = (code, reason)


async def connected(manager: ConnectionManager, count: int = 1) -> list[Socket]:
    sockets = [Socket() for _ in range(count)]
    for socket in sockets:
        await manager.connect(socket)
    return sockets


def hello(n: int = 0) -> dict:
    return {"type": "hello", "payload": {"n": n}}


@virtual
async def test_everyone_gets_what_is_broadcast_in_the_order_of_the_calls() -> None:
    async with ConnectionManager() as manager:
        sockets = await connected(manager, 3)
        assert manager.get_connection_count() == 3
        assert manager.active_connections == sockets
        for n in range(5):
            assert await manager.broadcast(hello(n)) == 3
        await asyncio.sleep(1)
        for socket in sockets:
            assert (socket.sent, socket.accepted) == ([hello(n) for n in range(5)], 1)
        assert await manager.send(sockets[0], hello(9)) is True
        assert await manager.send(Socket(), hello(9)) is False
        await asyncio.sleep(1)
        assert [len(socket.sent) for socket in sockets] == [6, 5, 5]


@virtual
async def test_subscribers_get_what_concerns_them_and_numbers_and_texts_are_the_same_id() -> None:
    async with ConnectionManager() as manager:
        one, both, none = await connected(manager, 3)
        uuid = UUID(int=5)
        await manager.handle_message(one, '{"type":"subscribe","characteristic_ids":[1]}')
        await manager.handle_message(both, {"type": "subscribe", "characteristic_ids": ["1", 2]})
        await manager.subscribe(both, [uuid])
        assert await manager.broadcast_to_characteristic(1, hello(1)) == 2
        assert await manager.broadcast_to_characteristic("2", hello(2)) == 1
        assert await manager.broadcast_to_characteristic(uuid, hello(3)) == 1
        assert await manager.broadcast_to_characteristic(4, hello(4)) == 0
        await manager.handle_message(both, b'{"type":"unsubscribe","characteristic_ids":["1"]}')
        await manager.unsubscribe(both, [2])
        assert await manager.broadcast_to_characteristic(1, hello(5)) == 1
        assert await manager.broadcast_to_characteristic(2, hello(6)) == 0
        await asyncio.sleep(1)

        def answers(socket):
            return [each for each in socket.sent if each["type"] != "hello"]

        def heard(socket):
            return [each["payload"]["n"] for each in socket.sent if each["type"] == "hello"]

        assert (heard(one), heard(both), heard(none)) == ([1, 5], [1, 2, 3], [])
        assert answers(one) == [{"type": "subscribed", "payload": {"characteristic_ids": ["1"]}}]
        assert answers(both)[-1] == {"type": "unsubscribed", "payload": {"characteristic_ids": [str(uuid), "2"]}}


BAD = [
    ("{", "no JSON"),
    ("[]", "a JSON object with a type"),
    ("7", "a JSON object with a type"),
    ("{}", "type 'None' is not known; there are subscribe, unsubscribe, ping and pong"),
    ('{"type":"dance"}', "type 'dance' is not known"),
    ('{"type":["subscribe"]}', "is not known"),
    ('{"type":"subscribe"}', "characteristic_ids is to be a list"),
    ('{"type":"subscribe","characteristic_ids":5}', "characteristic_ids is to be a list"),
    ('{"type":"subscribe","characteristic_ids":"5"}', "characteristic_ids is to be a list"),
    ('{"type":"subscribe","characteristic_ids":[null]}', "'None' is no id"),
    ('{"type":"subscribe","characteristic_ids":[true]}', "'True' is no id"),
    ('{"type":"subscribe","characteristic_ids":[1.5]}', "'1.5' is no id"),
    ('{"type":"subscribe","characteristic_ids":[""]}', "'' is no id"),
    ('{"type":"subscribe","characteristic_ids":["' + "x" * 257 + '"]}', "is no id"),
    ('{"type":"subscribe","characteristic_ids":[1,2,3,4,5]}', "at most 4 characteristics"),
    (b"\xff\xfe", "no JSON"),
    (" " * ((1 << 20) + 1), "at most 1048576 bytes"),
]


@pytest.mark.parametrize(("said", "told"), BAD, ids=lambda each: str(each)[:40])
def test_a_client_that_says_nonsense_is_told_and_stays(said, told) -> None:
    @virtual
    async def main() -> None:
        async with ConnectionManager(max_subscriptions=4) as manager:
            (socket,) = await connected(manager)
            await manager.handle_message(socket, said)
            await manager.broadcast(hello())
            await asyncio.sleep(1)
            error, after = socket.sent
            assert error["type"] == "error"
            assert told in error["payload"]["message"]
            assert after == hello()
            assert manager.get_stats()["subscriptions"] == 0

    main()


@virtual
async def test_a_ping_is_answered_and_every_client_is_pinged_each_30_seconds() -> None:
    async with ConnectionManager() as manager:
        (socket,) = await connected(manager)
        await manager.handle_message(socket, '{"type":"ping"}')
        await asyncio.sleep(91)
        assert manager.get_stats()["longest_silence"] == 91
        assert socket.sent == [{"type": "pong"}, *[{"type": "ping"}] * 3]
        assert socket.closed is None, "pages that only listen are welcome"


@virtual
async def test_where_clients_are_to_ping_one_that_says_nothing_is_closed() -> None:
    async with ConnectionManager(client_timeout=90.0) as manager:
        silent, talks = await connected(manager, 2)
        for _ in range(5):
            await asyncio.sleep(30)
            await manager.handle_message(talks, {"type": "pong"})
        assert manager.get_stats()["longest_silence"] == 0
        assert silent.closed == (3012, "said nothing for too long")
        assert manager.active_connections == [talks]


@virtual
async def test_a_client_that_takes_nothing_is_closed_by_the_second_ping_and_holds_up_nobody() -> None:
    async with ConnectionManager() as manager:
        stuck, fine = await connected(manager, 2)
        stuck.reads.clear()
        await manager.broadcast(hello())
        await asyncio.sleep(1)
        assert fine.sent == [hello()]
        await asyncio.sleep(60)
        assert stuck.closed == (3012, "takes nothing")
        assert manager.active_connections == [fine]


@virtual
async def test_a_client_that_reads_too_slowly_is_sent_away_at_the_bound(caplog) -> None:
    async with ConnectionManager(queue_size=10) as manager:
        slow, fine = await connected(manager, 2)
        slow.reads.clear()
        for n in range(20):
            await manager.broadcast(hello(n))
            await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        assert slow.closed == (3008, "reads too slowly")
        assert [each["payload"]["n"] for each in fine.sent] == list(range(20))
        assert (manager.get_connection_count(), manager.get_stats()["slow"]) == (1, 1)
        assert "reads too slowly and is sent away" in caplog.text


@virtual
async def test_or_loses_the_oldest_and_is_told_how_many_in_their_place() -> None:
    async with ConnectionManager(queue_size=3, slow="drop_oldest") as manager:
        (slow,) = await connected(manager)
        slow.reads.clear()
        for n in range(10):
            await manager.broadcast(hello(n))
            await asyncio.sleep(0.01)
        slow.reads.set()
        await asyncio.sleep(1)
        gap = {"type": "gap", "payload": {"dropped": 6}}
        assert slow.sent == [hello(0), gap, hello(7), hello(8), hello(9)]
        assert (slow.closed, manager.get_stats()["dropped"]) == (None, 6)


@virtual
async def test_messages_of_a_moment_come_as_one_where_that_is_chosen() -> None:
    async with ConnectionManager(batch_interval=0.05) as manager:
        (socket,) = await connected(manager)
        for n in range(3):
            await manager.broadcast(hello(n))
        await asyncio.sleep(0.04)
        assert socket.sent == []
        await asyncio.sleep(0.02)
        assert socket.sent == [{"type": "batch", "payload": [hello(0), hello(1), hello(2)]}]
        await manager.broadcast(hello(3))
        await asyncio.sleep(1)
        assert socket.sent[1:] == [hello(3)], "one alone is no batch"


@virtual
async def test_a_client_that_is_gone_is_forgotten_with_its_subscriptions() -> None:
    async with ConnectionManager() as manager:
        gone, stays = await connected(manager, 2)
        for socket in (gone, stays):
            await manager.subscribe(socket, [1])
        gone.gone = True
        assert await manager.broadcast_to_characteristic(1, hello(0)) == 2
        await asyncio.sleep(1)
        assert await manager.broadcast_to_characteristic(1, hello(1)) == 1
        assert stays.sent == [hello(0), hello(1)][: len(stays.sent)]
        await manager.disconnect(stays)
        assert (manager.get_connection_count(), manager.get_stats()["subscriptions"]) == (0, 0)
        assert manager._subscribers == {}
        await manager.disconnect(stays)
        await manager.handle_message(stays, "anything")
        assert manager.active_connections == []


@virtual
async def test_connecting_twice_is_connecting_once() -> None:
    async with ConnectionManager() as manager:
        (socket,) = await connected(manager)
        await manager.connect(socket)
        assert await manager.broadcast(hello()) == 1


@virtual
async def test_too_many_connections_are_refused() -> None:
    async with ConnectionManager(max_connections=1) as manager:
        await connected(manager)
        refused = Socket()
        with pytest.raises(ConnectRefused, match="1 connections already"):
            await manager.connect(refused)
        assert refused.closed == (1013, "too many connections")


@virtual
async def test_not_even_many_at_once_are_more_than_allowed() -> None:
    class Slow(Socket):
        async def accept(self) -> None:
            await asyncio.sleep(1)

    async with ConnectionManager(max_connections=2) as manager:
        sockets = [Slow() for _ in range(5)]
        outcomes = await asyncio.gather(*map(manager.connect, sockets), return_exceptions=True)
        assert manager.get_connection_count() == 2
        assert [type(outcome) for outcome in outcomes[2:]] == [ConnectRefused] * 3
        assert [socket.closed for socket in sockets[2:]] == [(1013, "too many connections")] * 3


@virtual
async def test_a_client_that_is_sent_away_as_it_subscribes_is_not_remembered() -> None:
    async with ConnectionManager() as manager:
        (socket,) = await connected(manager)
        connection = manager._connections[id(socket)]
        await manager.disconnect(socket)
        manager._subscribe(connection, ["5"])  # as another thread may have it
        assert manager._subscribers == {}


@virtual
async def test_stopping_sends_what_waits_and_then_a_goodbye_even_to_those_that_hang() -> None:
    manager = ConnectionManager()
    await manager.start()
    fine, stuck = await connected(manager, 2)
    stuck.reads.clear()

    async def hangs(*_) -> None:
        await asyncio.get_running_loop().create_future()

    stuck.close = hangs
    await manager.broadcast(hello())
    await manager.stop()
    assert fine.sent == [hello()]
    assert fine.closed == (3001, "the server stops")
    assert now() <= 5
    assert manager.get_connection_count() == 0
    await manager.start()
    await manager.stop()


@virtual
async def test_what_is_no_message_is_refused_before_anyone_gets_it() -> None:
    async with ConnectionManager() as manager:
        (socket,) = await connected(manager)
        for wrong in ([], "x", {"type": "a", "payload": object()}, {"x": float("nan")}):
            with pytest.raises(EventNotSerializable):
                await manager.broadcast(wrong)
        await asyncio.sleep(1)
        assert socket.sent == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"ping_interval": 0},
        {"ping_interval": None},
        {"client_timeout": -1},
        {"batch_interval": 0},
        {"max_connections": 0},
        {"queue_size": 1.5},
        {"slow": "wait"},
        {"queue": 5},
    ],
)
def test_a_wrong_setting_is_named(wrong) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}=.* is not allowed"):
        ConnectionManager(**wrong)


async def test_a_wrong_id_of_the_programs_own_is_refused() -> None:
    async with ConnectionManager() as manager:
        (socket,) = await connected(manager)
        with pytest.raises(ConfigError, match="characteristic_ids="):
            await manager.subscribe(socket, [None])


# Real servers and clients.


def application(manager: ConnectionManager) -> FastAPI:
    app = FastAPI()

    @app.websocket("/served")
    async def served(websocket: WebSocket) -> None:
        await manager.serve(websocket)

    @app.websocket("/by-hand")
    async def by_hand(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        try:
            while True:
                await manager.handle_message(websocket, await websocket.receive_text())
        except WebSocketDisconnect:
            await manager.disconnect(websocket)

    return app


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("path", ["/served", "/by-hand"])
async def test_real_clients_subscribe_hear_and_leave_and_another_loop_broadcasts(path, loop, caplog) -> None:
    caplog.set_level(logging.ERROR)
    manager = ConnectionManager()
    with Server(application(manager), loop=loop) as server:
        async with connect(server.url(path)) as client, connect(server.url(path)) as other:
            await client.send('{"type":"subscribe","characteristic_ids":[5]}')
            assert json.loads(await client.recv())["type"] == "subscribed"
            await eventually(lambda: manager.get_connection_count() == 2)
            for n in range(100):  # from this loop, which is not the server's
                assert await manager.broadcast_to_characteristic(5, hello(n)) == 1
            assert [json.loads(await client.recv()) for _ in range(100)] == [hello(n) for n in range(100)]
            assert await manager.broadcast(hello(100)) == 2
            assert json.loads(await other.recv()) == hello(100)
            other.transport.abort()
            await eventually(lambda: manager.get_connection_count() == 1)
        await eventually(lambda: manager.get_connection_count() == 0)
    assert caplog.records == []


async def test_a_real_client_that_reads_nothing_is_sent_away() -> None:
    manager = ConnectionManager(queue_size=50)
    with Server(application(manager)) as server:
        async with connect(server.url("/served"), max_queue=1, ping_interval=None) as slow:
            await eventually(lambda: manager.get_connection_count() == 1)
            big = {"type": "hello", "payload": "x" * 200_000}
            while manager.get_connection_count():
                await manager.broadcast(big)
                await asyncio.sleep(0)
            with contextlib.suppress(ConnectionClosed):  # it ends, and 3008 may not have got through
                async for _ in slow:
                    pass
        assert manager.get_stats()["slow"] == 1


async def test_over_a_hub_its_clients_hear_everything_with_positions_and_recover_what_they_missed() -> None:
    async with EventBroadcaster(port=0) as hub, ConnectionManager(hub=hub) as manager:
        socket = Socket()
        await manager.connect(socket)
        await manager.subscribe(socket, [5])
        async with subscriber(hub.url, "characteristic/5") as (ws, first):
            assert await manager.broadcast_to_characteristic(5, hello(1)) == 2
            frame = json.loads(await ws.recv())
            assert frame["data"] == {**hello(1), "topic": "characteristic/5"}
        await manager.broadcast_to_characteristic(5, hello(2))
        async with connect(hub.url) as ws:
            since = {"epoch": first["epoch"], "offset": frame["seq"]}
            await ws.send(json.dumps({"type": "subscribe", "data": {"events": ["characteristic/5"], "since": since}}))
            assert json.loads(await ws.recv())["recovered"] is True
            assert json.loads(await ws.recv())["data"]["payload"] == {"n": 2}
        await eventually(lambda: len(socket.sent) == 2)
        assert socket.sent == [hello(1), hello(2)], "its own clients see no topic"


async def test_a_hub_that_is_down_does_not_keep_messages_from_the_clients(caplog) -> None:
    async with ConnectionManager(hub=EventBroadcaster(port=0)) as manager:
        (socket,) = await connected(manager)
        assert await manager.broadcast(hello()) == 1
        await eventually(lambda: socket.sent == [hello()])
    assert "the hub did not take a message of type hello" in caplog.text
