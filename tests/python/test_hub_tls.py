"""A hub with a certificate of its own, and our emitter on the way to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from safe_broadcaster import ConfigError, EventBroadcaster

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


async def test_files_that_do_not_belong_together_are_refused(certificate: tuple[Path, Path]) -> None:
    cert, _ = certificate
    for wrong in ({"tls_cert": cert}, {"tls_cert": cert, "tls_key": cert}, {"tls_cert": "/none", "tls_key": "/none"}):
        with pytest.raises(ConfigError, match=r"tls_(cert|key)=.* is not allowed"):
            await EventBroadcaster(port=0, **wrong).start()
