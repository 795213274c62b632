"""Fixtures: a directory for spills, a broadcaster that is stopped in the end, a plain server."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import itertools
import signal
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from redis_server import RedisServer
from safe_broadcaster import BroadcastError, SafeBroadcaster
from support import QUICK, HealthBus, PlainServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Run in the background of a shell; the programs that the tests start would inherit it and ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def spill_path(tmp_path: Path) -> Path:
    return tmp_path / "spill.db"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bus() -> HealthBus:
    return HealthBus()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., SafeBroadcaster]]:
    """Make broadcasters with quick settings, each with a spill of its own unless one is given."""
    made: list[SafeBroadcaster] = []
    names = itertools.count(1)

    def build(ws_client: object, spill_path: object = None, health_bus: Any = None, **settings: Any) -> SafeBroadcaster:
        path = tmp_path / f"spill-{next(names)}.db" if spill_path is None else spill_path
        made.append(SafeBroadcaster(ws_client, path, health_bus, **{**QUICK, **settings}))
        return made[-1]

    yield build
    for broadcaster in made:
        with contextlib.suppress(BroadcastError):  # a test may have stopped or broken it
            await broadcaster.stop(0)


@pytest.fixture
async def server() -> AsyncIterator[PlainServer]:
    async with PlainServer() as running:
        yield running


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    place = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (place / "cert.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    (place / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return place / "cert.pem", place / "key.pem"
