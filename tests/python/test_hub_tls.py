"""A hub with a certificate of its own, and our emitter on the way to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from safe_broadcaster import ConfigError, EventBroadcaster
from support import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from safe_broadcaster import SafeBroadcaster

    Make = Callable[..., SafeBroadcaster]


async def test_an_emitter_that_trusts_the_certificate_delivers(make: Make, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with EventBroadcaster(port=0, tls_cert=cert, tls_key=str(key), auth="t") as hub:
        assert hub.url == f"wss://127.0.0.1:{hub.port}/ws"
        broadcaster = make(hub.url, ssl_ca=cert, token="t")
        await broadcaster.start(10)
        await broadcaster.safe_emit({"type": "x"})
        assert await broadcaster.drain(10)
        assert hub.get_stats()["events"] == 1
        assert hub.get_stats()["tls_error"] is None
        stranger = make(hub.url, token="t")
        with pytest.raises(TimeoutError):
            await stranger.start(0.5)


async def test_a_certificate_that_cannot_be_used_is_logged_and_the_old_one_goes_on(
    make: Make, certificate: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trusted, key = certificate
    good = trusted.read_text()
    cert = tmp_path / "cert.pem"
    cert.write_text(good)
    async with EventBroadcaster(port=0, tls_cert=cert, tls_key=key, supervision_interval=0.02) as hub:
        cert.write_text("nonsense")
        await eventually(lambda: "the hub's certificate cannot be used" in caplog.text)
        assert str(cert) in caplog.text
        broadcaster = make(hub.url, ssl_ca=trusted)
        await broadcaster.start(10)
        cert.write_text(good)
        await eventually(lambda: "the hub uses its certificate again" in caplog.text)
        assert caplog.text.count("cannot be used") == 1


async def test_files_that_do_not_belong_together_are_refused(certificate: tuple[Path, Path]) -> None:
    cert, _ = certificate
    for wrong in ({"tls_cert": cert}, {"tls_cert": cert, "tls_key": cert}, {"tls_cert": "/none", "tls_key": "/none"}):
        with pytest.raises(ConfigError, match=r"tls_(cert|key)=.* is not allowed"):
            await EventBroadcaster(port=0, **wrong).start()
