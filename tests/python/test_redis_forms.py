"""A Redis that is not one server: sentinels that know who leads, and a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from redis import asyncio as redis_py

import redis_server
from redis_server import RedisServer
from safe_broadcaster import EventBroadcaster, SafeBroadcaster
from safe_broadcaster.exceptions import BusUnavailable
from support import QUICK, eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not redis_server.is_there(), reason=redis_server.MISSING)

FAST: dict[str, Any] = {"port": 0, "probe_interval": 0.3, "bus_timeout": 5.0, "breaker_cooldown": 0.5}


def place(tmp_path: Path, name: str) -> Path:
    made = tmp_path / name
    made.mkdir()
    return made


async def test_a_replica_takes_over_and_emitters_lose_nothing(tmp_path) -> None:
    leader = RedisServer(place(tmp_path, "leader"))
    leader.start()
    replica = RedisServer(place(tmp_path, "replica"), "--replicaof", "127.0.0.1", str(leader.port))
    replica.start()
    conf = place(tmp_path, "sentinel") / "sentinel.conf"
    conf.write_text(
        f"sentinel monitor main 127.0.0.1 {leader.port} 1\n"
        "sentinel down-after-milliseconds main 500\n"
        "sentinel failover-timeout main 3000\n"
    )
    sentinel = RedisServer(conf.parent, config=conf)
    sentinel.start()
    try:
        await eventually(lambda: "master_link_status:up" in replica.command("INFO", "replication"))
        await eventually(lambda: f"{replica.port}" in sentinel.command("SENTINEL", "REPLICAS", "main"), 20)
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main"
        async with (
            EventBroadcaster(url, **FAST) as one,
            EventBroadcaster(url, **FAST) as two,
            SafeBroadcaster(one.url, tmp_path / "spill.db", **QUICK) as emitter,
        ):
            for n in range(100):
                await emitter.safe_emit({"type": "t", "data": n})
            assert await emitter.drain(10)
            epoch = two.get_stats()["epoch"]
            await eventually(lambda: "lag=0" in leader.command("INFO", "replication"))
            leader.stop()
            for n in range(100, 200):
                await emitter.safe_emit({"type": "t", "data": n})
            assert await emitter.drain(40)
            await eventually(lambda: one.is_listener_healthy() and two.is_listener_healthy(), 20)
            await eventually(lambda: two.get_stats()["offset"] == one.get_stats()["offset"])
            stored = [frame["data"]["data"] for frame in two.get_messages_since(0)]
            if two.get_stats()["epoch"] == epoch:
                assert stored == list(range(200)), "the replica had everything"
            else:  # it lacked what hubs had seen: they say so, and what came then is whole
                assert stored == list(range(200 - len(stored), 200))
    finally:
        for server in (sentinel, replica, leader):
            server.stop()


async def test_sentinels_are_asked_with_their_own_password_and_a_database_is_used(tmp_path) -> None:
    leader = RedisServer(place(tmp_path, "leader"), "--requirepass", "s3cret")
    leader.start()
    conf = place(tmp_path, "sentinel") / "sentinel.conf"
    conf.write_text(
        f"sentinel monitor main 127.0.0.1 {leader.port} 1\nsentinel auth-pass main s3cret\nrequirepass oth3r\n"
    )
    sentinel = RedisServer(conf.parent, config=conf)
    sentinel.start()
    try:
        sentinels = redis_py.Sentinel([("127.0.0.1", sentinel.port)], sentinel_kwargs={"password": "oth3r"})
        theirs = sentinels.master_for("main", password="s3cret", db=3)
        url = f"redis+sentinel://:s3cret@127.0.0.1:{sentinel.port}/main/3?sentinel_password=oth3r"
        async with EventBroadcaster(url, **FAST) as one, EventBroadcaster(theirs, **FAST) as two:
            assert await one.broadcast("t", 0) == 2
            await eventually(lambda: two.get_stats()["offset"] == 1)
            assert leader.command("-a", "s3cret", "-n", "3", "EXISTS", "{sb1:safe_broadcaster}:meta") == "1"
        with pytest.raises(BusUnavailable, match=r"(?i)auth"):
            await EventBroadcaster(url.partition("?")[0], **FAST).start()
    finally:
        for server in (sentinel, leader):
            server.stop()


async def test_a_cluster_is_asked_who_has_the_stream(tmp_path) -> None:
    # Its second port is 10 000 above the first one by itself, where none may be.
    server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(redis_server.free_port()))
    server.start()
    try:
        server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        await eventually(lambda: "cluster_state:ok" in server.command("CLUSTER", "INFO"), 20)
        url = f"redis+cluster://127.0.0.1:{redis_server.free_port()},127.0.0.1:{server.port}"
        async with EventBroadcaster(url, **FAST) as one, EventBroadcaster(url, **FAST) as two:
            assert await one.broadcast("t", 0) == 2
            await eventually(lambda: two.get_stats()["offset"] == 1)
            slot = server.command("CLUSTER", "KEYSLOT", "sb1:safe_broadcaster")
            assert server.command("CLUSTER", "COUNTKEYSINSLOT", slot)
    finally:
        server.stop()
