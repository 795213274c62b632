"""The emitter against a plain WebSocket server: start, ready, order, flush, drain, stop, and misuse."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import time
import weakref
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import websockets

from safe_broadcaster import BroadcasterClosed, ConnectTimeout, SafeBroadcaster, SpillLocked
from support import (
    NOWHERE,
    QUICK,
    AsyncClient,
    PlainServer,
    SyncClient,
    event,
    eventually,
    eventually_blocking,
    numbers,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., SafeBroadcaster]


# ── start and ready ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_start_returns_when_the_link_is_live(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    assert (broadcaster.connected, broadcaster.ready.is_set()) == (False, False)
    await broadcaster.start()
    assert (broadcaster.connected, broadcaster.ready.is_set()) == (True, True)
    assert await broadcaster.ready.wait() is True


async def test_start_in_time_raises_and_goes_on_in_the_background(make: Make) -> None:
    server = PlainServer()
    async with server:
        pass  # it has a port now, and is down
    broadcaster = make(server.url)
    with pytest.raises(ConnectTimeout, match="cannot connect") as caught:
        await broadcaster.start(0.5)
    assert isinstance(caught.value, TimeoutError)
    async with server:
        await asyncio.wait_for(broadcaster.ready.wait(), 5)
        assert broadcaster.connected
        await broadcaster.stop()


async def test_ready_is_latched_and_connected_is_not(make: Make) -> None:
    server = PlainServer()
    async with server:
        broadcaster = make(server.url)
        await broadcaster.start(5)
    await eventually(lambda: not broadcaster.connected)
    assert broadcaster.ready.is_set()
    with pytest.raises(ConnectTimeout):
        await broadcaster.wait_connected(0.05)
    async with server:
        await broadcaster.wait_connected(5)
        assert broadcaster.connected
        await broadcaster.stop()


async def test_ready_can_be_awaited_before_start_and_by_many(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    waiting = [asyncio.create_task(broadcaster.ready.wait()) for _ in range(10)]
    await asyncio.sleep(0)
    await broadcaster.start(5)
    assert await asyncio.gather(*waiting) == [True] * 10


async def test_start_twice_is_one_start(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await asyncio.gather(broadcaster.start(5), broadcaster.start(5))
    await broadcaster.start(5)
    assert await broadcaster.safe_emit(event(1), durability="delivered")
    assert (server.connects, numbers(server.events)) == (1, [1])


async def test_async_with_starts_and_stops(server: PlainServer, spill_path: Path) -> None:
    async with SafeBroadcaster(server.url, spill_path, **QUICK) as broadcaster:
        assert await broadcaster.safe_emit(event(1)) is True
    assert numbers(server.events) == [1], "stop drains"
    with pytest.raises(BroadcasterClosed):
        await broadcaster.safe_emit(event(2))


async def test_a_server_of_the_websockets_package_is_served(make: Make) -> None:
    received: list[Any] = []

    async def handler(socket: Any) -> None:
        async for message in socket:
            assert isinstance(message, str)
            received.append(orjson.loads(message))

    async with websockets.serve(handler, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        broadcaster = make(f"ws://127.0.0.1:{port}/any/path?x=1")
        await broadcaster.start(5)
        outcomes = await asyncio.gather(*(broadcaster.safe_emit(event(n)) for n in range(1000)))
        assert outcomes == [True] * 1000
        assert await broadcaster.drain(5)
        await eventually(lambda: numbers(received) == list(range(1000)))
        await broadcaster.stop()


async def test_headers_and_token_are_sent(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url, token="s3cret", headers={"X-Engine": "ada"})
    await broadcaster.start(5)
    sent = server.requests[0]
    assert (sent["authorization"], sent["x-engine"]) == ("Bearer s3cret", "ada")


async def test_an_idle_link_is_pinged_and_stays(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url, ping_interval=0.05, ack_timeout=0.2)
    await broadcaster.start(5)
    await asyncio.sleep(0.6)  # three ack_timeouts in which nothing but Pings proves that the link lives
    assert (server.connects, broadcaster.connected) == (1, True)


# ── the spill ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_before_start_events_spill_and_are_sent_after_it(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    assert [await broadcaster.safe_emit(event(n)) for n in range(3)] == [False] * 3
    assert (len(broadcaster.spill), broadcaster.spill_count, broadcaster.emit_count) == (3, 3, 0)
    await broadcaster.start(5)
    assert await broadcaster.safe_emit(event(3)) in (True, False)
    assert await broadcaster.drain(5)
    assert numbers(server.events) == [0, 1, 2, 3]
    assert len(broadcaster.spill) == 0


async def test_the_spill_shows_what_it_holds_oldest_first(make: Make) -> None:
    broadcaster = make(NOWHERE)
    for n in range(500):
        await broadcaster.safe_emit(event(n))
        if n == 250:
            await broadcaster.flush_spill()
    assert numbers(list(broadcaster.spill)) == list(range(500)), "whether on disk yet or not"
    assert numbers(broadcaster.spill.peek(2)) == [0, 1]
    assert numbers(broadcaster.spill.peek()) == [0]
    assert broadcaster.spill.peek(0) == []
    assert len(broadcaster.spill) == 500, "looking changes nothing"


async def test_the_spill_is_read_in_pages_and_shows_all_of_them(make: Make) -> None:
    broadcaster = make(NOWHERE)
    for n in range(3000):
        broadcaster.emit_nowait(event(n, text="x" * 1000))
    assert numbers(list(broadcaster.spill)) == list(range(3000))


async def test_the_spill_shows_nothing_that_is_confirmed(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    for n in range(100):
        await broadcaster.safe_emit(event(n))
    await broadcaster.start(5)
    assert await broadcaster.drain(5)
    assert (len(broadcaster.spill), list(broadcaster.spill)) == (0, [])


async def test_an_outage_spills_and_the_flush_starts_by_itself_in_order(make: Make) -> None:
    server = PlainServer()
    async with server:
        broadcaster = make(server.url)
        await broadcaster.start(5)
        for n in range(10):
            assert await broadcaster.safe_emit(event(n)) is True
        assert await broadcaster.drain(5)
    await eventually(lambda: not broadcaster.connected)
    for n in range(10, 1000):
        assert await broadcaster.safe_emit(event(n)) is False
    assert len(broadcaster.spill) == 990
    async with server:
        await broadcaster.wait_connected(5)
        for n in range(1000, 1100):
            await broadcaster.safe_emit(event(n))
        assert await broadcaster.drain(5)
        assert numbers(server.events) == list(range(1100)), "live events do not overtake the flush"
        assert broadcaster.flush_count >= 990
        assert broadcaster.emit_count + broadcaster.spill_count >= 1100
        await broadcaster.stop()


async def test_order_is_kept_across_many_cuts(make: Make, server: PlainServer) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    broadcaster = make(server.url, stamp=True)
    await broadcaster.start(5)
    for n in range(3000):
        await broadcaster.safe_emit(event(n))
        if rng.random() < 0.01:
            await asyncio.sleep(rng.random() * 0.01)
            server.cut()
    assert await broadcaster.drain(20)
    await broadcaster.stop()
    seen: set[int] = set()
    first_seen = [n for n in numbers(server.events) if not (n in seen or seen.add(n))]
    assert first_seen == list(range(3000))


async def test_flush_spill_tells_what_it_achieved(make: Make) -> None:
    server = PlainServer()
    async with server:
        pass
    broadcaster = make(server.url, backoff_initial=20, backoff_max=20)
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.05)
    for n in range(5):
        await broadcaster.safe_emit(event(n))
    result = await asyncio.wait_for(broadcaster.flush_spill(), 5)
    assert (result.flushed, result.remaining) == (0, 5)
    assert result.failed >= 1
    async with server:
        result = await asyncio.wait_for(broadcaster.flush_spill(), 5)
        assert result == (5, 0, 0), "without waiting for the backoff"
        assert numbers(server.events) == [0, 1, 2, 3, 4]
        assert await broadcaster.flush_spill() == (0, 0, 0)
        await broadcaster.stop()


async def test_flush_spill_before_start_tells_that_nothing_went(make: Make) -> None:
    broadcaster = make(NOWHERE)
    await broadcaster.safe_emit(event(1))
    assert await asyncio.wait_for(broadcaster.flush_spill(), 5) == (0, 1, 1)


async def test_flush_rate_bounds_the_flush(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url, flush_rate=100)
    for n in range(30):
        await broadcaster.safe_emit(event(n))
    started = time.monotonic()
    await broadcaster.start(5)
    assert await broadcaster.drain(5)
    assert time.monotonic() - started > 0.15, "30 events at 100/s, of which a tenth of a second may be saved up"
    assert numbers(server.events) == list(range(30))


async def test_drain_is_false_if_not_in_time_and_true_when_all_is_confirmed(make: Make) -> None:
    async with PlainServer(pongs=False) as server:
        broadcaster = make(server.url, ack_timeout=30)
        assert await broadcaster.drain(5) is True, "nothing accepted, nothing to wait for"
        await broadcaster.start(5)
        await broadcaster.safe_emit(event(1))
        assert await broadcaster.drain(0.05) is False
        server.pongs = True
        server.cut()
        assert await broadcaster.drain(5) is True
        await broadcaster.stop()


# ── stop and misuse ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_stop_drains_and_says_good_bye(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    for n in range(1000):
        await broadcaster.safe_emit(event(n))
    await broadcaster.stop()
    assert numbers(server.events) == list(range(1000))
    await eventually(lambda: server.closes)


async def test_stop_leaves_in_the_spill_what_cannot_be_sent(make: Make, spill_path: Path) -> None:
    broadcaster = make(NOWHERE, spill_path)
    for n in range(100):
        await broadcaster.safe_emit(event(n))
    await broadcaster.stop(0.05)
    again = make(NOWHERE, spill_path)
    assert numbers(list(again.spill)) == list(range(100))


async def test_stop_twice_at_once_and_later_is_one_stop(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    await asyncio.wait_for(asyncio.gather(broadcaster.stop(), broadcaster.stop(), broadcaster.stop()), 5)
    await asyncio.wait_for(broadcaster.stop(), 5)


async def test_stop_before_start_opens_nothing(make: Make, spill_path: Path) -> None:
    broadcaster = make(NOWHERE, spill_path)
    await broadcaster.stop()
    await broadcaster.stop()
    assert not spill_path.exists()
    with pytest.raises(BroadcasterClosed):
        await broadcaster.start(5)


async def test_after_stop_everything_says_closed(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    await broadcaster.stop()
    with pytest.raises(BroadcasterClosed, match="make a new one"):
        await broadcaster.safe_emit(event(1))
    with pytest.raises(BroadcasterClosed):
        broadcaster.emit_nowait(event(1))
    for ask in (
        lambda: broadcaster.start(5),
        lambda: broadcaster.wait_connected(5),
        broadcaster.flush_spill,
        lambda: broadcaster.drain(5),
    ):
        with pytest.raises(BroadcasterClosed):
            await asyncio.wait_for(ask(), 5)
    with pytest.raises(BroadcasterClosed):
        list(broadcaster.spill)
    assert broadcaster.get_stats()["ws_available"] is False
    assert broadcaster.ready.is_set(), "it has been ready"


async def test_questions_that_race_with_stop_are_all_answered(make: Make, server: PlainServer) -> None:
    for _ in range(30):
        broadcaster = make(server.url)
        await broadcaster.start(5)

        async def ask(broadcaster: SafeBroadcaster = broadcaster) -> None:
            for _ in range(20):
                await asyncio.gather(broadcaster.drain(), broadcaster.flush_spill(), broadcaster.wait_connected())

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.0005)
        await broadcaster.stop(0)
        outcome = (await asyncio.wait_for(asyncio.gather(asking, return_exceptions=True), 5))[0]
        assert outcome is None or isinstance(outcome, BroadcasterClosed)


async def test_a_cancelled_stop_goes_on(make: Make, spill_path: Path) -> None:
    broadcaster = make(NOWHERE, spill_path)
    with pytest.raises(ConnectTimeout):
        await broadcaster.start(0.05)
    await broadcaster.safe_emit(event(1))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(broadcaster.stop(0.2), 0.01)
    await asyncio.wait_for(broadcaster.stop(), 5)
    assert numbers(list(make(NOWHERE, spill_path).spill)) == [1]


async def test_waiters_are_answered_when_the_spill_cannot_be_opened(make: Make, spill_path: Path) -> None:
    owner = make(NOWHERE, spill_path)
    await owner.safe_emit(event(0))
    await eventually(lambda: owner.get_stats()["epoch"])
    broadcaster = make(NOWHERE, spill_path)
    waiting = asyncio.create_task(broadcaster.wait_connected())
    with pytest.raises(SpillLocked):
        await broadcaster.start(5)
    await broadcaster.stop()
    with pytest.raises(BroadcasterClosed):
        await asyncio.wait_for(waiting, 5)


async def test_start_again_succeeds_once_the_other_owner_has_gone(
    make: Make, server: PlainServer, spill_path: Path
) -> None:
    owner = make(NOWHERE, spill_path)
    await owner.safe_emit(event(0))
    await eventually(lambda: owner.get_stats()["epoch"])
    broadcaster = make(server.url, spill_path)
    with pytest.raises(SpillLocked):
        await broadcaster.start(5)
    with pytest.raises(SpillLocked):  # accepted, but not safe from a killed process
        await broadcaster.safe_emit(event(1))
    await owner.stop(0)
    await broadcaster.start(5)
    assert await broadcaster.drain(5)
    assert numbers(server.events) == [0, 1]


async def test_init_twice_is_refused(make: Make) -> None:
    broadcaster = make(NOWHERE)
    with pytest.raises(ValueError, match="twice"):
        broadcaster.__init__(NOWHERE)  # type: ignore[misc]


def test_a_subclass_that_forgets_init_is_told(spill_path: Path) -> None:
    class Forgetful(SafeBroadcaster):
        def __init__(self) -> None:
            pass

    with pytest.raises(BroadcasterClosed, match="__init__"):
        Forgetful().safe_emit({})


@pytest.mark.parametrize("client", ["url", SyncClient, AsyncClient])
async def test_a_forgotten_broadcaster_is_collected_and_keeps_its_events(
    make: Make, server: PlainServer, spill_path: Path, client: Any
) -> None:
    target: Any = server.url if client == "url" else client()
    broadcaster = SafeBroadcaster(target, spill_path, **QUICK)
    await broadcaster.start(5)
    if client != "url":
        target.up, target.fail_connect = False, OSError("stays down")
    else:
        server.pongs = False
    await broadcaster.safe_emit(event(1))
    gone = weakref.ref(broadcaster)
    del broadcaster
    gc.collect()
    assert gone() is None
    heir = make(NOWHERE, spill_path)

    async def inherited() -> list[int]:
        while True:
            try:
                return numbers(list(heir.spill))
            except SpillLocked:
                with pytest.raises((SpillLocked, ConnectTimeout)):
                    await heir.start(0.02)

    assert await asyncio.wait_for(inherited(), 5) == [1]


def test_what_was_accepted_right_before_being_forgotten_is_stored(spill_path: Path) -> None:
    for n in range(50):
        broadcaster = SafeBroadcaster(NOWHERE, spill_path)
        eventually_blocking(lambda b=broadcaster: _opened(b))
        gc.collect()  # so that nothing but the name refers to it: the emit and the end follow each other at once
        broadcaster.emit_nowait(event(n))
        del broadcaster
    last = SafeBroadcaster(NOWHERE, spill_path)
    eventually_blocking(lambda: _opened(last))
    assert numbers(list(last.spill)) == list(range(50))
    last._stop_blocking(0)


def _opened(broadcaster: SafeBroadcaster) -> bool:
    """Whether the spill is this one's; the one before may still be closing it."""
    with contextlib.suppress(SpillLocked, ConnectTimeout):
        asyncio.run(broadcaster.start(0.001))
    return broadcaster.get_stats()["epoch"] is not None


async def test_a_stopped_broadcaster_is_let_go(make: Make, server: PlainServer, spill_path: Path) -> None:
    for client in (server.url, AsyncClient()):
        broadcaster = SafeBroadcaster(client, spill_path, **QUICK)
        await broadcaster.start(5)
        await broadcaster.stop()
        gone = weakref.ref(broadcaster)
        del broadcaster
        gc.collect()
        assert gone() is None


async def test_stats_have_the_seed_keys_and_cost_no_disk(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    seed = {"emit_count", "spill_count", "flush_count", "current_spill_depth", "ready", "ws_available"}
    more = {
        "acked_seq", "last_seq", "in_flight", "dropped", "oldest_unacked_age", "spill_bytes", "breaker", "degraded",
        "reconnects", "last_error", "fsync_p99", "emit_success_rate_1m", "flush_latency_last", "flush_remaining",
        "flush_rate_current", "flush_window_bytes",
    }  # fmt: skip
    assert seed | more <= broadcaster.get_stats().keys()
    await broadcaster.safe_emit(event(0))
    await broadcaster.start(5)
    await broadcaster.safe_emit(event(1))
    assert await broadcaster.drain(5)
    stats = broadcaster.get_stats()
    assert {name: stats[name] for name in ("spill_count", "flush_count", "acked_seq", "last_seq", "in_flight")} == {
        "spill_count": 1, "flush_count": 1, "acked_seq": 2, "last_seq": 2, "in_flight": 0,
    }  # fmt: skip
    assert (stats["emit_count"], stats["ready"], stats["ws_available"], stats["breaker"]) == (1, True, True, "closed")


async def test_a_lost_link_is_told_in_the_stats(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url)
    await broadcaster.start(5)
    server.cut()
    await eventually(lambda: broadcaster.get_stats()["reconnects"] == 1)
    assert broadcaster.get_stats()["last_error"]


async def test_stamped_events_carry_emitter_epoch_and_rising_seq(make: Make, server: PlainServer) -> None:
    broadcaster = make(server.url, stamp=True, emitter_id="ada")
    await broadcaster.start(5)
    for each in ({}, event(1), {"_sb_": 1}):
        await broadcaster.safe_emit(each)
    assert await broadcaster.drain(5)
    stamps = [each.pop("_sb") for each in server.events]
    assert server.events == [{}, event(1), {"_sb_": 1}]
    assert [stamp["seq"] for stamp in stamps] == [1, 2, 3]
    assert {(stamp["emitter"], stamp["epoch"]) for stamp in stamps} == {("ada", broadcaster.get_stats()["epoch"])}


async def test_a_hundred_broadcasters_share_a_process(make: Make, server: PlainServer) -> None:
    many = [make(server.url) for _ in range(100)]
    await asyncio.gather(*(each.start(10) for each in many))
    await asyncio.gather(*(each.safe_emit(event(n), durability="delivered") for n, each in enumerate(many)))
    assert sorted(numbers(server.events)) == list(range(100))


async def test_a_failing_mailbox_handler_does_not_stop_the_others(
    make: Make, server: PlainServer, caplog: pytest.LogCaptureFixture
) -> None:
    class Bus:
        def inject(self, _report: dict[str, Any]) -> None:
            raise RuntimeError("no")

    with caplog.at_level(logging.CRITICAL, logger="safe_broadcaster"):
        broadcaster = make(server.url, None, Bus())
        await broadcaster.start(5)
        assert await broadcaster.safe_emit(event(1), durability="delivered") is True
