"""A real client of redis-py as ``redis_client``, against servers that want a login, TLS, or have no memory left."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from redis import asyncio as redis_py
from websockets.asyncio.client import connect

import redis_server
from redis_server import RedisServer
from safe_broadcaster import EventBroadcaster, SafeBroadcaster
from safe_broadcaster.exceptions import BusUnavailable, ConfigError
from support import QUICK, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    Serve = Callable[..., RedisServer]

pytestmark = pytest.mark.skipif(not redis_server.is_there(), reason=redis_server.MISSING)

FAST: dict[str, Any] = {"port": 0, "probe_interval": 0.3, "bus_timeout": 2.0, "breaker_cooldown": 0.5}
META = "{sb1:safe_broadcaster}:meta"
PASSWORD = "p@ss/w:rd?#%"

RIGHTS = (
    "+eval +evalsha +script|load +info +select +subscribe +publish +get +set +del +hget +hset +hmget "
    "+hdel +zadd +zcard +zpopmin +rpush +lindex +lpop +xadd +xtrim +xrange +time"
)
"""As docs/hub.md tells."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    servers: list[RedisServer] = []

    def start(*options: str, **more: Any) -> RedisServer:
        server = RedisServer(tmp_path, *options, **more)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
async def client() -> AsyncIterator[Callable[..., redis_py.Redis]]:
    clients: list[redis_py.Redis] = []

    def make(**settings: Any) -> redis_py.Redis:
        clients.append(redis_py.Redis(**settings))
        return clients[-1]

    yield make
    for each in clients:
        await each.aclose()


def user(*rules: str) -> tuple[str, ...]:
    """The options of a server that knows a user of this name besides the one without a password."""
    return ("--user", "app", "on", f">{PASSWORD}", "resetkeys", "resetchannels", *rules)


EVERYTHING = ("~*", "&*", "+@all")


async def test_a_clients_place_database_and_login_are_used_and_the_client_is_left_alone(serve, client) -> None:
    server = serve(*user(*EVERYTHING))
    theirs = client(host="127.0.0.1", port=server.port, db=3, username="app", password=PASSWORD, decode_responses=True)
    await theirs.set("mine", "1")
    connections = int(await theirs.client_id())
    async with EventBroadcaster(theirs, **FAST) as hub:
        assert await hub.broadcast("t", 0) == 1
        assert server.command("-n", "3", "EXISTS", META) == "1"
        assert server.command("EXISTS", META) == "0"
        assert server.command("CLIENT", "LIST").count("user=app") == 3, "two of the hub's own, and the program's"
        assert PASSWORD not in repr(hub.config) + json.dumps(hub.get_stats())
        other = EventBroadcaster(f"redis://127.0.0.1:{server.port}/3", **FAST)
        async with other:
            assert await hub.broadcast("t", 1) == 2, "the same stream by a URL"
    assert await theirs.get("mine") == "1"
    assert int(await theirs.client_id()) == connections, "and its connection is the one it had"


async def test_a_pool_and_a_url_of_the_client_are_read_too(serve) -> None:
    server = serve(*user(*EVERYTHING))
    theirs = redis_py.from_url(f"redis://app:p%40ss%2Fw%3Ard%3F%23%25@127.0.0.1:{server.port}/2")
    async with EventBroadcaster(theirs, **FAST) as hub:
        assert await hub.broadcast("t", 0) == 1
        assert server.command("-n", "2", "EXISTS", META) == "1"
    await theirs.aclose()
    pool = redis_py.BlockingConnectionPool(host="127.0.0.1", port=server.port, db=4)
    async with EventBroadcaster(redis_py.Redis(connection_pool=pool), **FAST) as hub:
        assert await hub.broadcast("t", 0) == 1
        assert server.command("-n", "4", "EXISTS", META) == "1"


async def test_a_socket_of_the_machine(serve, client, tmp_path) -> None:
    path = tmp_path / "r.sock"
    server = serve("--unixsocket", str(path))
    async with EventBroadcaster(client(unix_socket_path=str(path), db=1), **FAST) as hub:
        assert await hub.broadcast("t", 0) == 1
        assert server.command("-n", "1", "EXISTS", META) == "1"


async def test_tls_is_spoken_and_the_certificate_checked(serve, client, certificate) -> None:
    server = serve(*user(*EVERYTHING), tls=certificate)
    where: dict[str, Any] = {"host": "127.0.0.1", "port": server.port, "username": "app", "password": PASSWORD}
    theirs = client(ssl=True, ssl_ca_certs=str(certificate[0]), **where)
    assert await theirs.ping()
    async with EventBroadcaster(theirs, **FAST) as hub:
        assert await hub.broadcast("t", 0) == 1
    url = f"rediss://127.0.0.1:{server.port}/0"
    async with EventBroadcaster(url, redis_ca=certificate[0], **FAST) as hub:
        assert await hub.broadcast("t", 1) == 1
    with pytest.raises(BusUnavailable, match=r"(?i)certificate"):
        await EventBroadcaster(url, **FAST).start()
    with pytest.raises(ConfigError, match=r"redis_ca=.*nothing\.pem is not allowed"):
        await EventBroadcaster(url, redis_ca="nothing.pem", **FAST).start()
    for unchecked in (client(ssl=True, ssl_cert_reqs="none", **where), client(ssl=True, ssl_cert_reqs=0, **where)):
        with pytest.raises(ConfigError, match="redis_ca"):
            EventBroadcaster(unchecked)
    with pytest.raises(ConfigError, match="redis_ca"):
        await EventBroadcaster(url + "#insecure", **FAST).start()


async def test_a_wrong_password_or_database_is_told_at_once(serve, client) -> None:
    server = serve(*user(*EVERYTHING))
    slow = {**FAST, "bus_timeout": 60.0}
    where: dict[str, Any] = {"host": "127.0.0.1", "port": server.port}
    for wrong in (
        client(username="app", password="wr0ng", **where),
        client(username="nobody", password=PASSWORD, **where),
        client(db=99, **where),
    ):
        began = time.monotonic()
        with pytest.raises(BusUnavailable, match=f"cannot use the Redis at redis://.*{server.port}") as caught:
            await EventBroadcaster(wrong, **slow).start()
        assert time.monotonic() - began < 20, "it is not tried again and again"
        assert "wr0ng" not in str(caught.value)
        assert PASSWORD not in str(caught.value)


async def test_the_rights_that_are_documented_are_enough(serve, client, tmp_path) -> None:
    server = serve(*user("~{sb1:safe_broadcaster}*", "&{sb1:safe_broadcaster}*", "&safe_broadcaster", *RIGHTS.split()))
    theirs = client(host="127.0.0.1", port=server.port, username="app", password=PASSWORD)
    async with (
        EventBroadcaster(theirs, **FAST, replay_age=1.0) as hub,
        SafeBroadcaster(hub.url, tmp_path / "spill.db", **QUICK) as emitter,
    ):
        for n in range(10):
            await emitter.safe_emit({"type": "t", "data": n})
        assert await emitter.drain(10)
        server.command("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: hub.get_stats()["bridge"]["up"] and hub.get_stats()["bridge"]["losses"] >= 0)
        assert await hub.broadcast("t", 10) == 1
        async with EventBroadcaster(theirs, **FAST) as late:
            assert late.get_stats()["offset"] == 11
        assert not hub.is_degraded()


LACKING = ["xadd", "xtrim", "xrange", "hset", "hdel", "lpop", "zpopmin"]  # in the scripts, and beside them:
LACKING += ["publish", "subscribe", "evalsha", "info"]


@pytest.mark.parametrize("command", LACKING)
async def test_a_right_that_is_missing_is_named_at_the_start(serve, client, command) -> None:
    server = serve(*user("~*", "&*", "+@all", f"-{command}"))
    theirs = client(host="127.0.0.1", port=server.port, username="app", password=PASSWORD)
    hub = EventBroadcaster(theirs, **{**FAST, "bus_timeout": 60.0})
    with pytest.raises(BusUnavailable, match=rf"(?i)cannot use the Redis at .*\b{command}\b"):
        await asyncio.wait_for(hub.start(), 20)
    assert server.command("KEYS", "*") == "", "and nothing was left behind"


@pytest.mark.parametrize("rules", [("~other*", "&*"), ("~*", "&other*")])
async def test_keys_or_channels_that_are_somebody_elses_are_told_at_the_start(serve, client, rules) -> None:
    server = serve(*user(*rules, "+@all"))
    theirs = client(host="127.0.0.1", port=server.port, username="app", password=PASSWORD)
    with pytest.raises(BusUnavailable, match=r"(?i)(permissions|can't access).*(key|channel)"):
        await asyncio.wait_for(EventBroadcaster(theirs, **{**FAST, "bus_timeout": 60.0}).start(), 20)


async def test_a_replica_is_no_place_for_a_hub(serve, tmp_path) -> None:
    leader = serve()
    (tmp_path / "replica").mkdir()
    replica = RedisServer(tmp_path / "replica", "--replicaof", "127.0.0.1", str(leader.port))
    replica.start()
    try:
        await eventually(lambda: "master_link_status:up" in replica.command("INFO", "replication"))
        with pytest.raises(BusUnavailable, match=r"(?i)read ?only"):
            await EventBroadcaster(replica.url, **FAST).start()
    finally:
        replica.stop()


async def test_a_redis_without_memory_is_told_once_loses_nothing_and_heals_by_itself(serve, client, tmp_path) -> None:
    server = serve("--maxmemory-policy", "noeviction")
    theirs = client(host="127.0.0.1", port=server.port)
    statuses: list[str] = []
    events: list[int] = []

    async def listen(url: str) -> None:
        async with connect(url) as ws:
            await ws.send(json.dumps({"type": "subscribe", "data": {"events": ["*"]}}))
            async for text in ws:
                frame = json.loads(text)
                if frame.get("type") == "service_status":
                    statuses.append(frame["data"]["status"])
                elif frame.get("type") == "event":
                    events.append(frame["data"]["data"])

    async with (
        EventBroadcaster(theirs, **FAST) as one,
        EventBroadcaster(theirs, **FAST) as two,
        SafeBroadcaster(one.url, tmp_path / "spill.db", **QUICK) as emitter,
    ):
        listening = asyncio.create_task(listen(two.url))
        await eventually(lambda: two.get_connection_count() == 1)
        for n in range(10):
            await emitter.safe_emit({"type": "t", "data": n})
        assert await emitter.drain(10)
        server.command("CONFIG", "SET", "maxmemory", "1mb")
        for n in range(10, 30):
            await emitter.safe_emit({"type": "t", "data": n})
        await eventually(lambda: one.is_degraded() and two.is_degraded())
        with pytest.raises(BusUnavailable, match="used memory"):
            await one.broadcast("t", -1)
        assert "used memory" in one.get_stats()["bridge"]["error"]
        probes = two.get_stats()["bridge"]["probes"]
        await eventually(lambda: two.get_stats()["bridge"]["probes"] > probes + 4)
        assert one.is_listener_healthy(), "what others say can be heard all the time"
        assert two.is_listener_healthy()
        assert statuses == ["degraded"], "and once"
        server.command("CONFIG", "SET", "maxmemory", "0")
        assert await emitter.drain(20)
        await eventually(lambda: not one.is_degraded() and not two.is_degraded())
        await eventually(lambda: events[-1:] == [29])
        assert events == list(range(30))
        assert statuses == ["degraded", "healthy"]
        assert one.get_stats()["bridge"]["error"] is None
        listening.cancel()


async def test_a_hub_starts_on_a_redis_without_memory_and_waits(serve) -> None:
    server = serve("--maxmemory-policy", "noeviction")
    async with EventBroadcaster(server.url, **FAST) as one:
        await one.broadcast("t", 0)
        server.command("CONFIG", "SET", "maxmemory", "1mb")
        async with EventBroadcaster(server.url, **FAST) as two:
            await eventually(two.is_degraded)
            assert two.get_stats()["offset"] == 1
            server.command("CONFIG", "SET", "maxmemory", "0")
            await eventually(lambda: not two.is_degraded())
            assert await two.broadcast("t", 1) == 2
