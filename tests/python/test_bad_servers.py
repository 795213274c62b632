"""Servers that misbehave: reported, backed off, never a crash, never a busy loop, nothing lost."""

from __future__ import annotations

import asyncio
import random
import ssl
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import ConfigError, ConnectTimeout, SafeBroadcaster
from support import HealthBus, PlainServer, event, eventually, frame, numbers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., SafeBroadcaster]


async def fails_with(broadcaster: SafeBroadcaster, bus: HealthBus, reason: str, within: float = 0.4) -> None:
    """It never connects, says why, reports it, pauses between attempts, and keeps its event."""
    await broadcaster.safe_emit(event(1))
    with pytest.raises(ConnectTimeout, match=reason):
        await broadcaster.start(within)
    failures = bus.contents("broadcaster_connection_failed")
    assert failures
    assert all(each["metrics"]["retry_in"] > 0 for each in failures)
    assert (len(broadcaster.spill), broadcaster.ready.is_set()) == (1, False)


# ── URLs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        "", "localhost:8000", "http://localhost/", "https://localhost/", "ftp://x/", "ws://", "ws:///path", "wss://",
        "ws://u:p@localhost/", "ws://localhost/#part", "ws://localhost:99999/", "ws://local host/", "ws://[::1/", "ws",
    ],
)  # fmt: skip
def test_a_bad_url_is_refused_and_never_repeats_a_password(spill_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"ws_client: .*give a URL such as ws://") as caught:
        SafeBroadcaster(url, spill_path)
    assert "u:p" not in str(caught.value)


async def test_a_host_that_does_not_exist_is_reported(make: Make, bus: HealthBus) -> None:
    await fails_with(make("ws://no-such-host.invalid/", None, bus), bus, "no-such-host.invalid:80: cannot connect", 1)


async def test_a_port_where_nobody_listens_is_reported_and_not_hammered(make: Make, bus: HealthBus) -> None:
    broadcaster = make("ws://127.0.0.1:9/", None, bus, backoff_initial=0.1, backoff_max=0.1, jitter=0)
    await fails_with(broadcaster, bus, "127.0.0.1:9: cannot connect", 0.55)
    assert 3 <= len(bus.contents("broadcaster_connection_failed")) <= 6


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    make: Make, bus: HealthBus, tls: ssl.SSLContext
) -> None:
    async with PlainServer(tls=tls) as server:
        broadcaster = make(server.url, None, bus)
        await fails_with(broadcaster, bus, "TLS failed.*certificate")
        assert server.events == []
        await broadcaster.stop(0)


async def test_a_certificate_that_ssl_ca_vouches_for_is_taken(
    make: Make, tls: ssl.SSLContext, certificate: tuple[Path, Path]
) -> None:
    async with PlainServer(tls=tls) as server:
        broadcaster = make(server.url, ssl_ca=certificate[0])
        await broadcaster.start(5)
        assert await broadcaster.safe_emit(event(1), durability="delivered") is True
        assert numbers(server.events) == [1]
        await broadcaster.stop()


async def test_a_certificate_for_another_name_is_refused(
    make: Make, bus: HealthBus, tls: ssl.SSLContext, certificate: tuple[Path, Path]
) -> None:
    async with PlainServer(tls=tls) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        broadcaster = make(url, None, bus, ssl_ca=str(certificate[0]))
        await fails_with(broadcaster, bus, "TLS failed.*not valid for name")
        await broadcaster.stop(0)


async def test_tls_to_a_server_that_speaks_none_is_reported(make: Make, bus: HealthBus, server: PlainServer) -> None:
    server.greeting = b"hello"
    broadcaster = make(server.url.replace("ws://", "wss://"), None, bus, connect_timeout=0.1)
    await fails_with(broadcaster, bus, "TLS failed|did not answer within")


# ── handshakes ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Answering(PlainServer):
    """Gives a fixed answer to every request and keeps the connection open."""

    def __init__(self, answer: bytes) -> None:
        super().__init__()
        self.fixed = answer

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.read_request(reader)
        writer.write(self.fixed)
        await reader.read()  # until the emitter goes


ANSWERS = {
    "HTTP only": (b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", "answers HTTP 200"),
    "HTTP only, endless": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "answers HTTP 200"),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "answers HTTP 302"),
    "forbidden": (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "answers HTTP 403"),
    "unavailable": (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "answers HTTP 503"),
    "no accept key": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        "wrong Sec-WebSocket-Accept",
    ),
    "wrong accept key": (PlainServer.answer("AAAAAAAAAAAAAAAAAAAAAAAAAAA="), "wrong Sec-WebSocket-Accept"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.0\r\n", "does not answer as a WebSocket server"),
    "binary": (bytes(range(256)), "does not answer as a WebSocket server"),
    "endless head": (b"HTTP/1.1 101 x\r\n" + b"X-Pad: y\r\n" * 200_000, "does not answer as a WebSocket server"),
}


@pytest.mark.parametrize(("answer", "reason"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_an_answer_that_is_no_websocket_is_reported(
    make: Make, bus: HealthBus, answer: bytes, reason: str
) -> None:
    async with Answering(answer) as server:
        broadcaster = make(server.url, None, bus)
        await fails_with(broadcaster, bus, reason)
        assert server.connects <= 40, "backed off"
        await broadcaster.stop(0)


async def test_what_was_not_offered_is_not_taken(make: Make, bus: HealthBus) -> None:
    class Insisting(PlainServer):
        extra = ""

        async def shake_hands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write = _with(writer.write, self.extra)  # type: ignore[method-assign]
            await super().shake_hands(reader, writer)

    def _with(write: Any, extra: str) -> Any:
        return lambda data: write(data.replace(b"\r\n\r\n", f"\r\n{extra}\r\n\r\n".encode(), 1))

    for extra, reason in (
        ("Sec-WebSocket-Extensions: permessage-deflate", "insists on the extension"),
        ("Sec-WebSocket-Protocol: chat", "chose the subprotocol"),
    ):
        async with Insisting() as server:
            server.extra = extra
            broadcaster = make(server.url, None, bus)
            await fails_with(broadcaster, bus, reason)
            await broadcaster.stop(0)


class Silent(PlainServer):
    """Accepts and never answers."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()


async def test_a_server_that_never_answers_is_given_up_after_connect_timeout(make: Make, bus: HealthBus) -> None:
    async with Silent() as server:
        broadcaster = make(server.url, None, bus, connect_timeout=0.1)
        await fails_with(broadcaster, bus, "did not answer within 100ms", 0.5)
        assert 2 <= server.connects <= 5
        await broadcaster.stop(0)


async def test_a_drip_of_bytes_does_not_outlast_connect_timeout(make: Make, bus: HealthBus) -> None:
    class Dripping(PlainServer):
        async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.read_request(reader)
            for byte in b"HTTP/1.1 101 Switching Protocols\r\n" * 100:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.02)

    async with Dripping() as server:
        await fails_with(make(server.url, None, bus, connect_timeout=0.1), bus, "did not answer within 100ms")


# ── links that come up and go wrong ──────────────────────────────────────────────────────────────────────────────────


class Closing(PlainServer):
    """Shakes hands and closes at once; ``goodbye`` is written before."""

    goodbye = b""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.shake_hands(reader, writer)
        writer.write(self.goodbye)
        await writer.drain()


@pytest.mark.parametrize("goodbye", [b"", frame(0x8, b"\x03\xe9"), frame(0x8, b"\x03\xe9too busy")])
async def test_a_server_that_closes_at_once_opens_the_breaker(make: Make, bus: HealthBus, goodbye: bytes) -> None:
    async with Closing() as server:
        server.goodbye = goodbye
        broadcaster = make(
            server.url, None, bus, breaker_threshold=3, breaker_cooldown=30, backoff_initial=0.01, backoff_max=0.01
        )
        await broadcaster.safe_emit(event(1))
        await broadcaster.start(5)
        await eventually(lambda: broadcaster.get_stats()["breaker"] == "open")
        connects = server.connects
        assert connects == 3
        await asyncio.sleep(0.3)  # thirty backoffs
        assert server.connects == connects, "no busy loop: the breaker forbids attempts"
        await broadcaster.safe_emit(event(2))
        await eventually(
            lambda: any(spill["top_rejects"][0][0] == "breaker_open" for spill in bus.contents("broadcaster_spill"))
        )
        result = await asyncio.wait_for(broadcaster.flush_spill(), 5)
        assert (result.flushed, result.remaining) == (0, 2), "the breaker forbids it"
        await broadcaster.stop(0)


async def test_the_breaker_lets_one_attempt_through_and_closes_when_the_server_works(make: Make) -> None:
    bad = Closing()
    async with bad:
        broadcaster = make(bad.url, breaker_threshold=2, breaker_cooldown=0.3, backoff_initial=0.01, backoff_max=0.01)
        await broadcaster.safe_emit(event(1))
        await broadcaster.start(5)
        await eventually(lambda: broadcaster.get_stats()["breaker"] == "open")
        assert bad.connects == 2
        await eventually(lambda: bad.connects == 3)  # on trial
        await eventually(lambda: broadcaster.get_stats()["breaker"] == "open")
    good = PlainServer()
    good.port = bad.port
    async with good:
        assert await broadcaster.drain(5)
        assert (numbers(good.events), broadcaster.get_stats()["breaker"]) == ([1], "closed")
        await broadcaster.stop()


GARBAGE = {
    "reserved bits": b"\xf1\x00",
    "reserved opcode": frame(0x3, b"x"),
    "masked by a server": b"\x81\x81\x00\x00\x00\x00x",
    "text that is not UTF-8": frame(0x1, b"\xff\xfe"),
    "continuation of nothing": frame(0x0, b"x"),
    "fragmented ping": frame(0x9, b"x", fin=False),
    "ping of 126 bytes": frame(0x9, b"x" * 126),
    "ping of 10 MB": frame(0x9, b"x" * 10_000_000),
    "message of 10 MB": frame(0x1, b"x" * 10_000_000),
    "frame of 2**63 bytes": b"\x82\x7f" + b"\xff" * 8,
    "fragments without end": frame(0x1, b"x" * 60_000, fin=False) + frame(0x0, b"x" * 60_000, fin=False) * 100,
    "close frame of one byte": frame(0x8, b"\x03"),
    "random": random.Random(7).randbytes(100_000),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_ends_the_link_and_the_next_one_delivers(make: Make, bus: HealthBus, garbage: bytes) -> None:
    async with PlainServer(greeting=garbage, pongs=False) as server:
        broadcaster = make(server.url, None, bus)
        await broadcaster.safe_emit(event(1))
        await broadcaster.start(5)
        await eventually(lambda: server.connects >= 2)
        assert broadcaster.get_stats()["last_error"]
        assert server.connects < 50
        server.greeting, server.pongs = b"", True
        server.cut()
        assert await broadcaster.drain(5)
        assert set(numbers(server.events)) == {1}
        await broadcaster.stop(0)


async def test_harmless_frames_are_ignored(make: Make, server: PlainServer) -> None:
    """A server may talk to its clients; unsolicited Pongs are allowed (RFC 6455 §5.5.3)."""
    server.greeting = (
        frame(0x1, b'{"type":"welcome"}') + frame(0x2, b"\0" * 1000) + frame(0xA, b"hello") + frame(0xA, b"\xff" * 8)
        + frame(0x9, b"x" * 125) + frame(0x1, b"a", fin=False) + frame(0x0, b"b")
    )  # fmt: skip
    broadcaster = make(server.url)
    await broadcaster.start(5)
    assert await broadcaster.safe_emit(event(1), durability="delivered") is True
    assert (server.connects, numbers(server.events)) == (1, [1])


async def test_a_pong_that_lies_confirms_nothing_that_was_not_sent(make: Make) -> None:
    async with PlainServer(pongs=False) as server:
        broadcaster = make(server.url, ack_timeout=30)
        await broadcaster.start(5)
        await server.write(frame(0xA, b"\xff" * 8))
        await broadcaster.safe_emit(event(1))
        await eventually(lambda: server.events)
        await server.write(frame(0xA, (0).to_bytes(8, "big")))
        await asyncio.sleep(0.05)
        assert broadcaster.get_stats()["acked_seq"] == 0
        await broadcaster.stop(0)


async def test_a_server_that_reads_and_never_pongs_loses_the_link_after_ack_timeout(make: Make, bus: HealthBus) -> None:
    async with PlainServer(pongs=False) as server:
        broadcaster = make(server.url, None, bus, ack_timeout=0.2)
        await broadcaster.start(5)
        assert await broadcaster.safe_emit(event(1)) is True
        await eventually(lambda: server.connects == 2)
        assert "nothing was confirmed" in broadcaster.get_stats()["last_error"]
        assert len(broadcaster.spill) == 1, "unconfirmed is not delivered"
        server.pongs = True
        server.cut()
        assert await broadcaster.drain(5)
        assert set(numbers(server.events)) == {1}
        await broadcaster.stop()


async def test_a_server_that_stops_reading_does_not_block_the_caller(make: Make) -> None:
    class Deaf(PlainServer):
        async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.shake_hands(reader, writer)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(60)

    deaf = Deaf()
    async with deaf:
        broadcaster = make(deaf.url, ack_timeout=0.5, outbox_bytes=1 << 20)
        await broadcaster.start(5)
        for n in range(5000):
            await asyncio.wait_for(broadcaster.safe_emit(event(n, text="x" * 1000)), 5)
        await eventually(lambda: deaf.connects >= 2)
    heard = PlainServer()
    heard.port = deaf.port
    async with heard:
        assert await broadcaster.drain(10)
        assert numbers(heard.events) == list(range(5000))
        await broadcaster.stop()


# ── dying servers ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stamp", [False, True])
async def test_frames_written_to_a_dying_socket_are_sent_again(make: Make, server: PlainServer, stamp: bool) -> None:
    """TCP connections are reset in the middle of a flood: at least once, order kept, and stamps let duplicates go."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    total = 5000
    deaths = 0

    async def die(received: dict[str, Any]) -> None:
        nonlocal deaths
        if deaths < 8 and rng.random() < 0.002:
            deaths += 1
            server.cut()
            raise ConnectionError("killed")

    server.on_event = die
    broadcaster = make(server.url, stamp=stamp)
    await broadcaster.start(5)
    for n in range(total):
        await broadcaster.safe_emit(event(n))
        if n % 100 == 0:
            await asyncio.sleep(0)
    assert await broadcaster.drain(20)
    received = numbers(server.events)
    assert deaths > 0, "the test has to kill"
    assert set(received) == set(range(total)), "nothing is missing"
    seen: set[int] = set()
    first_seen = [n for n in received if not (n in seen or seen.add(n))]
    assert first_seen == list(range(total)), "in order"
    if stamp:
        stamps = [each["_sb"] for each in server.events]
        assert len({(each["emitter"], each["epoch"]) for each in stamps}) == 1
        kept, highest = [], 0
        for each in server.events:
            if each["_sb"]["seq"] > highest:
                highest = each["_sb"]["seq"]
                kept.append(each["content"]["n"])
        assert kept == list(range(total)), "one high-water mark is enough to drop duplicates"


async def test_half_a_frame_is_sent_again_whole(make: Make, server: PlainServer) -> None:
    big = "x" * 500_000

    class Cutting(PlainServer):
        cuts = 2

        async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self.cuts:
                self.cuts -= 1
                await self.shake_hands(reader, writer)
                await reader.readexactly(100_000)
                self.cut()
                return
            await super().handle(reader, writer)

    async with Cutting() as cutting:
        broadcaster = make(cutting.url)
        await broadcaster.start(5)
        assert await asyncio.wait_for(broadcaster.safe_emit(event(1, text=big), durability="delivered"), 5)
        assert [each["text"] for each in cutting.events] == [big]
        await broadcaster.stop()
