"""Links through an object of the user's: sync or async, and whatever it does wrong."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import ConfigError, ConnectTimeout, SafeBroadcaster
from support import (
    AsyncClient,
    FullyAsyncClient,
    HealthBus,
    SyncClient,
    event,
    eventually,
    numbers,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., SafeBroadcaster]

KINDS = [SyncClient, AsyncClient, FullyAsyncClient]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def client(request: pytest.FixtureRequest) -> SyncClient:
    return request.param()


async def test_events_arrive_as_the_objects_that_were_emitted_in_order(make: Make, client: SyncClient) -> None:
    broadcaster = make(client)
    await broadcaster.start(5)
    for n in range(1000):
        assert await broadcaster.safe_emit(event(n, more=[None, "ü", 0.5])) is True
    assert await broadcaster.drain(5)
    assert client.sent == [event(n, more=[None, "ü", 0.5]) for n in range(1000)]


async def test_a_client_that_is_up_is_not_connected_again(make: Make, client: SyncClient) -> None:
    broadcaster = make(client)
    await broadcaster.start(5)
    assert client.connects == 0


async def test_a_client_that_is_down_is_connected(make: Make, client: SyncClient) -> None:
    client.up = False
    broadcaster = make(client)
    await broadcaster.start(5)
    assert client.connects == 1
    assert broadcaster.connected


async def test_before_start_nothing_counts_as_sent(make: Make, client: SyncClient) -> None:
    """The client is up, but nobody sends yet."""
    broadcaster = make(client)
    assert broadcaster.get_stats()["ws_available"] is False
    assert await broadcaster.safe_emit(event(1)) is False
    assert (broadcaster.emit_count, broadcaster.spill_count) == (0, 1)
    await broadcaster.start(5)
    assert await broadcaster.drain(5)
    assert numbers(client.sent) == [1]


async def test_when_it_is_not_available_events_spill_and_then_flush_by_themselves(
    make: Make, client: SyncClient
) -> None:
    broadcaster = make(client)
    await broadcaster.start(5)
    client.up = False
    client.fail_connect = ConnectionError("still down")
    await eventually(lambda: not broadcaster.connected)
    for n in range(50):
        assert await broadcaster.safe_emit(event(n)) is False
    assert len(broadcaster.spill) == 50
    client.fail_connect = None
    assert await broadcaster.drain(5)
    assert numbers(client.sent) == list(range(50))
    assert broadcaster.flush_count == 50


@pytest.mark.parametrize("kind", [SyncClient, AsyncClient])
async def test_a_plain_is_available_is_believed_at_once(make: Make, kind: type[SyncClient]) -> None:
    client = kind()
    broadcaster = make(client)
    await broadcaster.start(5)
    client.up = False
    assert await broadcaster.safe_emit(event(1)) is False
    assert (broadcaster.connected, broadcaster.get_stats()["ws_available"]) == (False, False)


async def test_what_send_raised_for_is_sent_again_and_order_kept(make: Make, client: SyncClient) -> None:
    broadcaster = make(client)
    await broadcaster.start(5)
    client.fail_send = RuntimeError("broken pipe")
    for n in range(100):
        await broadcaster.safe_emit(event(n))
    await eventually(lambda: "broken pipe" in (broadcaster.get_stats()["last_error"] or ""))
    client.fail_send = None
    assert await broadcaster.drain(5)
    assert numbers(client.sent) == list(range(100))


async def test_a_send_that_fails_now_and_then_loses_nothing(make: Make) -> None:
    class Flaky(AsyncClient):
        calls = 0

        async def send(self, event: dict[str, Any]) -> None:
            self.calls += 1
            if self.calls % 7 == 0:
                raise ConnectionResetError("now and then")
            await super().send(event)

    client = Flaky()
    broadcaster = make(client)
    await broadcaster.start(5)
    for n in range(60):
        await broadcaster.safe_emit(event(n))
    assert await broadcaster.drain(10)
    assert numbers(client.sent) == list(range(60)), "what was sent is not sent again, what was not is"


async def test_a_connect_that_fails_is_reported_and_tried_again(make: Make, client: SyncClient, bus: HealthBus) -> None:
    client.up = False
    client.fail_connect = OSError("no route")
    broadcaster = make(client, None, bus)
    with pytest.raises(ConnectTimeout, match="no route"):
        await broadcaster.start(0.2)
    assert client.connects >= 2
    failures = bus.contents("broadcaster_connection_failed")
    assert failures[0]["top_rejects"] == [["ws_not_ready", 1]]
    assert "no route" in failures[0]["metrics"]["error"]
    client.fail_connect = None
    await broadcaster.wait_connected(5)


async def test_a_connect_that_never_returns_is_given_up_and_tried_again(make: Make) -> None:
    class Hanging(AsyncClient):
        cancelled = 0

        async def connect(self) -> None:
            self.connects += 1
            if self.connects < 3:
                try:
                    await asyncio.sleep(60)
                finally:
                    self.cancelled += 1
            self.up = True

    client = Hanging()
    client.up = False
    broadcaster = make(client, connect_timeout=0.05)
    await broadcaster.start(5)
    assert (client.connects, client.cancelled) == (3, 2)


async def test_a_send_that_never_returns_ends_the_link_and_is_repeated(make: Make) -> None:
    class Hanging(AsyncClient):
        hang = True

        async def send(self, event: dict[str, Any]) -> None:
            if self.hang:
                await asyncio.sleep(60)
            await super().send(event)

    client = Hanging()
    broadcaster = make(client, ack_timeout=0.1)
    await broadcaster.start(5)
    await broadcaster.safe_emit(event(1))
    await eventually(lambda: broadcaster.get_stats()["last_error"])
    client.hang = False
    assert await broadcaster.drain(5)
    assert numbers(client.sent) == [1]


@pytest.mark.parametrize("method", ["connect", "send"])
async def test_a_cancellation_inside_the_client_is_a_failure_like_others(make: Make, method: str) -> None:
    class Cancelling(AsyncClient):
        left = 2

        async def _fail(self) -> None:
            if self.left:
                self.left -= 1
                raise asyncio.CancelledError

        async def connect(self) -> None:
            if method == "connect":
                await self._fail()
            await super().connect()

        async def send(self, event: dict[str, Any]) -> None:
            if method == "send":
                await self._fail()
            await super().send(event)

    client = Cancelling()
    client.up = False
    broadcaster = make(client)
    await broadcaster.start(5)
    await broadcaster.safe_emit(event(1))
    assert await broadcaster.drain(5), "at once, not after ack_timeout"
    assert numbers(client.sent) == [1]


async def test_an_is_available_that_raises_means_no(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SyncClient):
        broken = False

        def is_available(self) -> bool:
            if self.broken:
                raise ZeroDivisionError
            return super().is_available()

    client = Broken()
    broadcaster = make(client)
    await broadcaster.start(5)
    client.broken = True
    with caplog.at_level(logging.CRITICAL, logger="safe_broadcaster"):
        assert await broadcaster.safe_emit(event(1)) is False
        assert broadcaster.connected is False
    client.broken = False
    assert await broadcaster.drain(5)
    assert numbers(client.sent) == [1]


async def test_a_client_that_vanishes_without_a_word_is_noticed(make: Make, client: SyncClient) -> None:
    broadcaster = make(client)
    await broadcaster.start(5)
    client.fail_connect = OSError("gone")
    client.up = False
    await eventually(lambda: "gone" in (broadcaster.get_stats()["last_error"] or ""))
    assert not broadcaster.connected


async def test_a_client_may_emit_while_it_sends(make: Make) -> None:
    """Re-entry: an event caused by an event."""

    class Echo(AsyncClient):
        async def send(self, event: dict[str, Any]) -> None:
            if event["content"]["n"] < 10:
                await broadcaster.safe_emit({"content": {"n": event["content"]["n"] + 1}})
            await super().send(event)

    client = Echo()
    broadcaster = make(client)
    await broadcaster.start(5)
    await broadcaster.safe_emit(event(0))
    await eventually(lambda: numbers(client.sent) == list(range(11)))


async def test_stop_drains_through_the_client(make: Make, client: SyncClient) -> None:
    broadcaster = make(client)
    await broadcaster.start(5)
    for n in range(500):
        broadcaster.emit_nowait(event(n))
    await broadcaster.stop()
    assert numbers(client.sent) == list(range(500))


async def test_delivered_from_another_thread_waits_for_the_client(make: Make, client: SyncClient) -> None:
    broadcaster = make(client)
    await broadcaster.start(5)
    outcome = await asyncio.to_thread(broadcaster.emit_nowait, event(1), durability="delivered")
    assert outcome is True
    assert numbers(client.sent) == [1]


async def test_emit_nowait_never_waits_for_its_own_thread(make: Make, client: SyncClient) -> None:
    broadcaster = make(client, when_full="wait", spill_max_events=10)
    await broadcaster.start(5)
    with pytest.raises(ConfigError, match="await safe_emit"):
        broadcaster.emit_nowait(event(0), durability="delivered")
    client.up = False
    client.fail_connect = OSError("down")
    await eventually(lambda: not broadcaster.connected)
    for n in range(12):
        broadcaster.emit_nowait(event(n))  # two over the bound
    client.fail_connect = None
    assert await broadcaster.drain(5)
    assert numbers(client.sent) == list(range(12))


async def test_a_flood_from_the_clients_own_loop_under_pressure_loses_nothing(make: Make) -> None:
    client = SyncClient()
    broadcaster = make(client, outbox_bytes=1 << 16, max_event_bytes=1 << 12)
    await broadcaster.start(5)
    for n in range(3000):
        broadcaster.emit_nowait(event(n, text="x" * 100))  # the client cannot send meanwhile: the disk takes it
    assert await broadcaster.drain(20)
    assert numbers(client.sent) == list(range(3000))


async def test_threads_and_the_clients_loop_may_emit_at_once(make: Make, client: SyncClient) -> None:
    broadcaster = make(client)
    await broadcaster.start(5)

    def work(base: int) -> None:
        for n in range(200):
            broadcaster.emit_nowait(event(base + n))

    threads = [threading.Thread(target=work, args=(1000 * t,)) for t in range(3)]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(broadcaster.safe_emit(event(9000 + n)) for n in range(200)))
    await eventually(lambda: not any(thread.is_alive() for thread in threads))
    assert await broadcaster.drain(5)
    received = numbers(client.sent)
    assert sorted(received) == sorted([1000 * t + n for t in (0, 1, 2, 9) for n in range(200)])
    for t in (0, 1, 2, 9):
        own = [n for n in received if n // 1000 == t]
        assert own == sorted(own)
