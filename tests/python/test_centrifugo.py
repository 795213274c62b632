"""Dashboards that speak Centrifugo's protocol, with its own Python client: they are pointed to this hub and work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from centrifuge import (
    Client,
    ClientEventHandler,
    ClientState,
    ReplyError,
    StreamPosition,
    SubscriptionEventHandler,
    SubscriptionState,
)
from starlette.applications import Starlette
from starlette.routing import Mount

from asgi import Server
from safe_broadcaster import EventBroadcaster, Grant, JwtAuth, SafeBroadcaster
from scripts import running
from support import QUICK, eventually
from test_hub_auth import KEY, jwt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from centrifuge import Subscription

HUB = """
async def serve():
    async with EventBroadcaster(port=int(sys.argv[2]), log_path=path):
        say("ready")
        await asyncio.Event().wait()
asyncio.run(serve())
"""


class Connection(ClientEventHandler):
    """What a client was told of its connection."""

    def __init__(self) -> None:
        self.connected = 0
        self.disconnected: int | None = None

    async def on_connected(self, ctx: Any) -> None:
        self.connected += 1

    async def on_disconnected(self, ctx: Any) -> None:
        self.disconnected = ctx.code


class Seen(SubscriptionEventHandler):
    """What a client was told of a channel."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.offsets: list[int] = []
        self.subscribed: list[Any] = []
        self.unsubscribed: int | None = None

    async def on_subscribed(self, ctx: Any) -> None:
        self.subscribed.append(ctx)

    async def on_unsubscribed(self, ctx: Any) -> None:
        self.unsubscribed = ctx.code

    async def on_publication(self, ctx: Any) -> None:
        self.events.append(ctx.pub.data)
        self.offsets.append(ctx.pub.offset)

    @property
    def data(self) -> list[Any]:
        return [event["data"] for event in self.events]


def address(hub: EventBroadcaster) -> str:
    return hub.url.removesuffix("/ws") + "/connection/websocket"


@contextlib.asynccontextmanager
async def dashboard(url: str, **options: Any) -> AsyncIterator[Client]:
    quick = {"min_reconnect_delay": 0.02, "max_reconnect_delay": 0.1, "proxy": None, "events": Connection()}
    client = Client(url, **{**quick, **options})
    await client.connect()
    try:
        yield client
    finally:
        await client.disconnect()


async def follow(client: Client, channel: str) -> tuple[Subscription, Seen]:
    seen = Seen()
    subscription = client.new_subscription(channel, events=seen)
    await subscription.subscribe()
    await subscription.ready()
    return subscription, seen


def cut(client: Client) -> None:
    """The connection is gone as it is when a network is."""
    assert client._conn is not None
    client._conn.transport.abort()


async def test_a_dashboard_gets_the_events_of_each_of_its_channels_in_order() -> None:
    async with EventBroadcaster(port=0) as hub, dashboard(address(hub)) as client:
        await hub.broadcast("other", 0)
        (_, alerts), (_, ada), (_, full) = [
            await follow(client, name) for name in ("alert.*", "graph/ada/*", "alert.*.full")
        ]
        for n in range(30):
            await hub.broadcast(
                ["alert.disk", "alert.disk.full", "other"][n % 3], n, f"graph/{['ada', 'bob'][n % 2]}/x"
            )
        await eventually(lambda: len(alerts.data) == 20 and len(ada.data) == 15 and len(full.data) == 10)
        assert alerts.data == [n for n in range(30) if n % 3 < 2]
        assert (ada.data, full.data) == (list(range(0, 30, 2)), list(range(1, 30, 3)))
        assert full.offsets == [n + 2 for n in full.data], "the offset is that of the hub's log"
        assert alerts.events[0] == {"type": "alert.disk", "data": 0, "topic": "graph/ada/x"}
        first = alerts.subscribed[0]
        assert (first.recoverable, first.positioned, first.was_recovering) == (True, True, False)
        assert first.stream_position == StreamPosition(1, hub.get_stats()["epoch"])
        assert hub.get_stats()["subscribers"] == 1


async def test_what_was_missed_while_away_comes_exactly_once_on_each_channel() -> None:
    async with EventBroadcaster(port=0) as hub, dashboard(address(hub)) as client:
        followed = {name: (await follow(client, name))[1] for name in ("even", "odd", "*")}
        for n in range(400):
            await hub.broadcast(["even", "odd"][n % 2], n)
            if n % 100 == 50:
                before = client.events.connected
                cut(client)
                for more in range(1000 + n, 1020 + n):
                    await hub.broadcast(["even", "odd"][more % 2], more)
                await eventually(lambda before=before: client.events.connected > before)
        everything = hub.get_stats()["offset"]
        await eventually(lambda: len(followed["*"].data) == everything)
        sent = followed["*"].data
        assert sorted(sent) == sorted(set(sent))
        await eventually(lambda: len(followed["even"].data) + len(followed["odd"].data) == everything)
        assert followed["even"].data == [n for n in sent if n % 2 == 0]
        assert followed["odd"].data == [n for n in sent if n % 2 == 1]
        for seen in followed.values():
            assert {again.recovered for again in seen.subscribed[1:]} == {True}


async def test_more_is_recovered_than_fits_into_a_queue(tmp_path: Path) -> None:
    async with EventBroadcaster(port=0, session_queue_bytes=16_384) as hub, dashboard(address(hub)) as client:
        names = [f"c{n}" for n in range(40)]
        followed = [(await follow(client, name))[1] for name in names]
        await client.disconnect()
        await eventually(lambda: hub.get_stats()["subscribers"] == 0)
        events = [{"type": names[n % 40], "data": n, "pad": "x" * 200} for n in range(8000)]
        await asyncio.gather(*(hub.broadcast_event(event) for event in events))
        await client.connect()
        await eventually(lambda: sum(len(seen.data) for seen in followed) == 8000, 30)
        for n, seen in enumerate(followed):
            assert sorted(seen.data) == list(range(n, 8000, 40))
            assert seen.offsets == sorted(seen.offsets)
            assert seen.subscribed[-1].recovered
        assert hub.get_stats()["slow"] == 0


@pytest.mark.timeout(120)
async def test_a_hub_that_is_killed_again_and_again_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    emitter = SafeBroadcaster(f"ws://127.0.0.1:{port}/ws", tmp_path / "spill.db", **QUICK)
    async with dashboard(f"ws://127.0.0.1:{port}/connection/websocket") as client:
        seen = Seen()
        await client.new_subscription("t", events=seen).subscribe()
        sent = 0
        for life in range(4):
            with running(HUB, tmp_path / "hub.db", port) as process:
                assert process.stdout
                assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
                await emitter.start(10)
                await eventually(lambda life=life: client.events.connected > life)
                for _ in range(500):
                    emitter.emit_nowait({"type": ["t", "u"][sent % 2], "data": sent})
                    sent += 1
                    if sent % 50 == 0:
                        await asyncio.sleep(0)
                if life == 3:
                    await eventually(lambda sent=sent: len(seen.data) == sent // 2)
                else:
                    await eventually(lambda life=life: len(seen.data) > 250 * life + 50)
                # Killed here, in the midst of it.
        await emitter.stop(0)
    assert seen.data == list(range(0, sent, 2))
    assert [again.recovered for again in seen.subscribed[1:]] == [True] * (len(seen.subscribed) - 1)
    assert len(seen.subscribed) >= 4


async def test_a_hub_that_forgot_says_so_and_gives_a_fresh_position() -> None:
    hub = EventBroadcaster(port=0)
    await hub.start()
    port = hub.port
    async with dashboard(address(hub)) as client:
        _, seen = await follow(client, "t")
        await hub.broadcast("t", 1)
        await eventually(lambda: seen.data == [1])
        await hub.stop()
        async with EventBroadcaster(port=port) as again:
            await eventually(lambda: len(seen.subscribed) == 2)
            told = seen.subscribed[1]
            assert (told.was_recovering, told.recovered) == (True, False)
            assert told.stream_position == StreamPosition(0, again.get_stats()["epoch"])
            await again.broadcast("t", 2)
            await eventually(lambda: seen.data == [1, 2])


async def test_a_client_that_prefers_it_loads_its_state_when_nothing_can_be_recovered() -> None:
    async with EventBroadcaster(port=0, replay_events=3) as hub, dashboard(address(hub)) as client:
        loaded = 0

        async def get_state(channel: str) -> StreamPosition:
            nonlocal loaded
            loaded += 1
            history = await client.history(channel)
            return StreamPosition(history.offset, history.epoch)

        seen = Seen()
        subscription = client.new_subscription("t", events=seen, get_state=get_state, min_resubscribe_delay=0.02)
        await subscription.subscribe()
        await eventually(lambda: seen.subscribed)
        client._address = "ws://127.0.0.1:9/"
        cut(client)
        for n in range(9):
            await hub.broadcast("t", n)
        client._address = address(hub)
        await eventually(lambda: len(seen.subscribed) == 2)
        assert loaded == 2
        await hub.broadcast("t", 9)
        await eventually(lambda: seen.data == [9])


async def test_publishing_is_granted_as_it_is_by_http() -> None:
    def check(token: str) -> Grant | None:
        return Grant(subscribe=("chat", "graph/*"), publish=("chat", "graph/*")) if token == "good" else None

    async with EventBroadcaster(port=0, auth=check) as hub, dashboard(address(hub), token="good") as client:
        (_, chat), (_, graph) = [await follow(client, name) for name in ("chat", "graph/*")]
        await client.publish("chat", {"text": "hi\nthere"})
        await client.publish("graph/ada", {"type": "chat", "n": 1})
        for channel, data, code in [
            ("other", {}, 103),
            ("graph/ada", {"type": "other"}, 103),
            ("chat", {"topic": "elsewhere"}, 103),
            ("chat", {"type": "other"}, 107),
            ("*", {}, 107),
            ("chat", "text", 107),
        ]:
            with pytest.raises(ReplyError) as refused:
                await client.publish(channel, data)
            assert refused.value.code == code, (channel, data)
        await eventually(lambda: len(chat.events) == 2)
        assert chat.events == [{"type": "chat", "text": "hi\nthere"}, {"topic": "graph/ada", "type": "chat", "n": 1}]
        assert graph.events == chat.events[1:]
        seen = Seen()
        await client.new_subscription("other", events=seen).subscribe()
        await eventually(lambda: seen.unsubscribed == 103)
        events = Connection()
        async with dashboard(address(hub), token="bad", events=events) as stranger:
            await eventually(lambda: events.disconnected == 101)
            assert stranger.state == ClientState.DISCONNECTED


async def test_history_is_what_the_log_has_and_presence_is_not_offered() -> None:
    async with EventBroadcaster(port=0) as hub, dashboard(address(hub)) as client:
        for n in range(10):
            await hub.broadcast("t" if n % 2 else "u", n)
        history = await client.history("t", limit=-1)
        assert [publication.data["data"] for publication in history.publications] == [1, 3, 5, 7, 9]
        assert (history.offset, history.epoch) == (10, hub.get_stats()["epoch"])
        since = StreamPosition(history.publications[1].offset, history.epoch)
        later = await client.history("t", limit=2, since=since)
        assert [publication.data["data"] for publication in later.publications] == [5, 7]
        back = await client.history("t", limit=2, reverse=True)
        assert [publication.data["data"] for publication in back.publications] == [9, 7]
        with pytest.raises(ReplyError) as lost:
            await client.history("t", limit=2, since=StreamPosition(1, "old"))
        assert lost.value.code == 112
        for ask in (client.presence("t"), client.presence_stats("t"), client.rpc("method", {})):
            with pytest.raises(ReplyError) as refused:
                await ask
            assert refused.value.code == 108


async def test_a_token_is_refreshed_before_it_ends_and_what_it_no_longer_grants_is_taken_away() -> None:
    made: list[float] = []

    async def get_token() -> str:
        made.append(time.time() + (2 if not made else 60))
        return jwt(exp=made[-1], subscribe=["t", "u"] if len(made) == 1 else ["t"])

    async with EventBroadcaster(port=0, auth=JwtAuth(secret=KEY, leeway=0)) as hub:
        async with dashboard(address(hub), get_token=get_token) as client:
            (_, stays), (gone, lost) = [await follow(client, name) for name in ("t", "u")]
            await eventually(lambda: lost.unsubscribed == 2000)
            assert gone.state == SubscriptionState.UNSUBSCRIBED
            await eventually(lambda: time.time() > made[0] + 0.3)
            await hub.broadcast("u", 1)
            await hub.broadcast("t", 2)
            await eventually(lambda: stays.data == [2])
            assert (client.events.connected, len(made), lost.data) == (1, 2, [])
        expired = Connection()
        token = jwt(exp=time.time() - 1, subscribe=["t"])
        async with dashboard(address(hub), token=token, get_token=get_token, events=expired):
            await eventually(lambda: expired.connected == 1)
            assert len(made) == 3, "told that the token has expired, it got a fresh one"


async def test_an_event_with_line_breaks_and_a_gap_do_not_disturb() -> None:
    async with EventBroadcaster(port=0) as hub, dashboard(address(hub)) as client:
        _, seen = await follow(client, "t")
        await client.publish("t", {"text": "a\nb"})
        reader, writer = await asyncio.open_connection("127.0.0.1", hub.port)
        body = json.dumps({"type": "t", "data": [1, {"a": "\n"}]}, indent=2).encode()
        head = f"POST /publish HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.read()
        writer.close()
        await eventually(lambda: len(seen.events) == 2)
        assert seen.events[1] == {"type": "t", "data": [1, {"a": "\n"}]}


async def test_behind_an_application_it_is_the_same() -> None:
    async with EventBroadcaster(port=0) as hub:
        application = Starlette(routes=[Mount("/hub", hub.asgi())])
        with Server(application) as server:
            async with dashboard(server.url("/hub/connection/websocket")) as client:
                _, seen = await follow(client, "t")
                await hub.broadcast("t", 1)
                await eventually(lambda: seen.data == [1])
                cut(client)
                await hub.broadcast("t", 2)
                await eventually(lambda: seen.data == [1, 2])
                assert seen.subscribed[1].recovered
                await client.publish("t", {"data": 3})
                await eventually(lambda: seen.data == [1, 2, 3])


class Node:
    """The JavaScript client, in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.told: list[dict[str, Any]] = []

    def ask(self, method: str, *values: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([method, *values]).encode() + b"\n")

    def of(self, name: str) -> list[Any]:
        return [told[name] for told in self.told if name in told]

    async def listen(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            self.told.append(json.loads(line))


@contextlib.asynccontextmanager
async def node(url: str, *channels: str) -> AsyncIterator[Node]:
    script = Path(__file__).with_name("centrifuge.mjs")
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec("node", script, url, *channels, **pipes)
    running = Node(process)
    listening = asyncio.create_task(running.listen())
    try:
        yield running
    finally:
        process.kill()
        await process.wait()
        await listening


@pytest.mark.skipif(
    "CENTRIFUGE_JS" not in os.environ,
    reason="CENTRIFUGE_JS is not set to a folder in which `npm install centrifuge ws` was run",
)
async def test_the_javascript_client_follows_recovers_and_publishes(tmp_path: Path) -> None:
    settings = {"log_path": tmp_path / "hub.db", "ping_interval": 0.5}
    hub = EventBroadcaster(port=0, **settings)
    await hub.start()
    port, epoch = hub.port, hub.get_stats()["epoch"]
    async with node(address(hub), "a.*", "a.b") as js:
        await eventually(lambda: len(js.of("subscribed")) == 2)
        for n in range(100):
            await hub.broadcast(["a.b", "a.c", "other"][n % 3], n)
        await eventually(lambda: len(js.of("publication")) == 67 + 34)
        await hub.stop()
        assert js.of("message")[0]["data"]["type"] == "bye"
        hub = EventBroadcaster(port=port, **settings)
        await hub.start()
        for n in range(100, 200):
            await hub.broadcast(["a.b", "a.c", "other"][n % 3], n)
        await eventually(lambda: len(js.of("publication")) == 134 + 67)
        for channel, kinds in (("a.*", (0, 1)), ("a.b", (0,))):
            told = [publication for publication in js.of("publication") if publication["channel"] == channel]
            assert [publication["data"]["data"] for publication in told] == [n for n in range(200) if n % 3 in kinds]
            assert [publication["offset"] for publication in told] == [n + 1 for n in range(200) if n % 3 in kinds]
        again = js.of("subscribed")[2:]
        assert [(told["wasRecovering"], told["recovered"]) for told in again] == [(True, True)] * 2
        assert {told["streamPosition"]["epoch"] for told in again} == {epoch}
        js.ask("publish", "a.b", {"data": "from a page"})
        js.ask("publish", "*", {})
        await eventually(lambda: js.of("publish") and js.of("error"))
        assert js.of("error")[0]["code"] == 107
        js.ask("history", "a.b", {"limit": 2, "since": {"offset": 198, "epoch": epoch}})
        await eventually(lambda: js.of("history"))
        assert [publication["offset"] for publication in js.of("history")[0]["publications"]] == [199, 201]
        await hub.stop()
