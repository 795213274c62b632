"""Who may connect to a hub: the setting ``auth``, from Python and over real sockets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import connect

from safe_broadcaster import ConfigError, EventBroadcaster, Grant, HubConfig, JwtAuth, SafeBroadcaster

if TYPE_CHECKING:
    from pathlib import Path

KEY = "0123456789abcdef0123456789abcdef"


def jwt(**claims: Any) -> str:
    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    head = part(b'{"alg":"HS256"}')
    body = f"{head}.{part(json.dumps(claims).encode())}"
    return f"{body}.{part(hmac.digest(KEY.encode(), body.encode(), hashlib.sha256))}"


async def show(hub: EventBroadcaster, token: str) -> dict[str, Any]:
    async with connect(hub.url) as client:
        await client.send(json.dumps({"type": "auth", "data": {"token": token}}))
        return json.loads(await client.recv())


async def test_an_emitter_with_the_token_is_let_in_and_one_without_is_not(spill_path: Path) -> None:
    async with EventBroadcaster(port=0, auth=["new", "old"]) as hub:
        for token in ("new", "old"):
            async with SafeBroadcaster(hub.url, spill_path, token=token) as broadcaster:
                await broadcaster.safe_emit({"type": "x"})
                assert await broadcaster.drain(10)
        async with connect(hub.url, additional_headers={"Authorization": "Bearer old"}) as client:
            assert json.loads(await client.recv())["action"] == "authenticated"
        stranger = SafeBroadcaster(hub.url, spill_path.with_name("other.db"), token="wrong", backoff_initial=0.05)
        with pytest.raises(TimeoutError):
            await stranger.start(timeout=0.5)
        assert "401" in str(stranger.get_stats()["last_error"])
        await stranger.stop(0)
        stats = hub.get_stats()
        assert (stats["events"], stats["auth_refused"] > 0) == (2, True)
    async with EventBroadcaster(port=0, auth="t") as hub, SafeBroadcaster(hub.client, spill_path) as local:
        await local.safe_emit({"type": "x"})
        assert await local.drain(10), "whoever is in the process needs no token"


async def test_signed_tokens_are_checked() -> None:
    async with EventBroadcaster(port=0, auth=JwtAuth(secret=KEY, issuer="us")) as hub:
        soon = time.time() + 60
        good = await show(hub, jwt(sub="ada", exp=soon, iss="us", subscribe=["a.*"]))
        assert good == {"action": "authenticated", "subject": "ada", "expires": pytest.approx(soon + 5)}
        for wrong in (jwt(exp=soon, iss="them"), jwt(iss="us"), "nonsense"):
            assert (await show(hub, wrong))["data"]["code"] == "unauthorized"
        assert (await show(hub, jwt(exp=1, iss="us")))["data"]["code"] == "token_expired"


async def test_a_function_decides_and_what_it_raises_refuses_and_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def check(token: str) -> Grant | None:
        await asyncio.sleep(0)
        match token:
            case "good":
                return Grant("ada", subscribe=["a.*"], expires=time.time() + 60)
            case "raises":
                raise ValueError(f"no such token: {token}")
            case "nonsense":
                return "yes"  # type: ignore[return-value]
            case "pattern":
                return Grant(subscribe=[""])
            case _:
                return None

    with caplog.at_level(logging.DEBUG):
        async with EventBroadcaster(port=0, auth=check) as hub:
            assert (await show(hub, "good"))["subject"] == "ada"
            assert (await show(hub, "bad"))["data"]["code"] == "unauthorized"
            for broken in ("raises", "nonsense", "pattern"):
                assert (await show(hub, broken))["data"]["code"] == "auth_unavailable"
    assert "ValueError" in caplog.text
    assert "no such token" not in caplog.text


def _plain(token: str) -> Grant | None:
    return Grant() if token == "t" else None


async def test_a_plain_function_is_taken_too() -> None:
    async with EventBroadcaster(port=0, auth=_plain) as hub:
        assert (await show(hub, "t"))["action"] == "authenticated"
        assert (await show(hub, "u"))["type"] == "error"


async def test_a_function_that_does_not_answer_refuses_after_auth_timeout() -> None:
    async def never(_: str) -> Grant:
        await asyncio.Event().wait()
        raise AssertionError

    async with EventBroadcaster(port=0, auth=never, auth_timeout=0.2) as hub:
        assert (await show(hub, "t"))["data"]["code"] == "auth_unavailable"


@pytest.mark.parametrize(
    "auth",
    ["", [], [""], 7, ["a", 1], JwtAuth(), JwtAuth(secret=KEY, public_key="x"), JwtAuth(secret="s3cret"),
     JwtAuth(public_key="nonsense"), JwtAuth(secret=KEY, leeway=-1)],
    ids=lambda each: repr(each)[:40],
)  # fmt: skip
async def test_a_wrong_setting_is_refused_and_not_shown(auth: Any) -> None:
    with pytest.raises(ConfigError, match=r"(auth|leeway)=.* is not allowed: give ") as caught:
        await EventBroadcaster(port=0, auth=auth).start()
    assert "s3cret" not in str(caught.value)


def test_settings_do_not_show_secrets() -> None:
    assert "s3cret" not in repr(HubConfig(auth="s3cret"))
    assert "s3cret" not in repr(JwtAuth(secret="s3cret"))
