"""Wrong settings are told at once: the setting, its value, what is allowed. Right ones reach the core."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safe_broadcaster import ConfigError, EmitterConfig, SafeBroadcaster
from support import NOWHERE

if TYPE_CHECKING:
    from collections.abc import Callable

    from safe_broadcaster.config import Durability

    Make = Callable[..., SafeBroadcaster]

TIMES = (
    "backoff_initial",
    "backoff_max",
    "connect_timeout",
    "ack_timeout",
    "ping_interval",
    "breaker_cooldown",
    "report_interval",
    "slo_flush_latency",
)
WRONG: list[tuple[str, Any]] = [
    *((name, value) for name in TIMES for value in (0, -1, math.nan, math.inf, 1e300, "1", None, [])),
    *(("spill_max_age", value) for value in (0, -1, math.nan, "1")),
    *(("durability", value) for value in ("", "Memory", "fsync", None, 1)),
    *(("emitter_id", value) for value in ("", "x" * 257, "a\nb", "a\0b", 7)),
    *(("outbox_bytes", value) for value in (0, -1, 1000, 1.5, "1", None, 1 << 70)),
    *(("spill_max_events", value) for value in (0, -1, 1.5, None)),
    *(("spill_max_bytes", value) for value in (0, 4095, -1, None)),
    *(("when_full", value) for value in ("", "drop", None, 3)),
    *(("poison_tries", value) for value in (0, -1, 1.5, None)),
    *(("parked_max_events", value) for value in (0, -1, 1.5, None)),
    *(("parked_max_bytes", value) for value in (0, 4095, -1, None)),
    *(("backoff_multiplier", value) for value in (0, 0.99, 101, math.nan, math.inf, None)),
    *(("jitter", value) for value in (-0.1, 1.1, math.nan, None)),
    *(("breaker_threshold", value) for value in (0, -1, 1.5, None)),
    *(("max_event_bytes", value) for value in (0, 1, -1, (16 << 20) + 1, None)),
    *(("headers", value) for value in (None, 7, {"a b": "x"}, {"": "x"}, {"a": "x\r\ny"}, {"a": 1}, {1: "a"})),
    *(("token", value) for value in ("", "a\nb", 7)),
    *(("ssl_ca", value) for value in (7, "/no/such/file.pem")),
    *(("stamp", value) for value in (None, "yes", 1)),
    *(("flush_rate", value) for value in (0, -1, math.nan, math.inf, "1")),
    *(("slo_emit_success_rate", value) for value in (-0.1, 1.1, math.nan, None)),
    *(("slo_spill_depth", value) for value in (-1, 1.5, None)),
    *(("slo_spill_depth_alert", value) for value in (-1, 99, None)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda each: repr(each)[:40])
def test_a_wrong_value_is_named_with_what_is_allowed(spill_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"\b{name}=.* is not allowed: give ") as caught:
        SafeBroadcaster(NOWHERE, spill_path, **{name: value})
    assert isinstance(caught.value, ValueError)
    assert not spill_path.exists(), "nothing is opened for a broadcaster that was refused"


async def test_a_wrong_level_for_one_call_is_refused_and_nothing_accepted(make: Make) -> None:
    broadcaster = make(NOWHERE)
    with pytest.raises(ConfigError, match="durability='never'"):
        broadcaster.safe_emit({}, durability="never")  # type: ignore[arg-type]  # which is what a wrong program does
    with pytest.raises(ConfigError, match="durability='never'"):
        broadcaster.emit_nowait({}, durability="never")  # type: ignore[arg-type]  # which is what a wrong program does
    assert broadcaster.get_stats()["last_seq"] == 0


@pytest.mark.parametrize("level", ["process", "power"])
async def test_a_level_that_needs_a_file_is_refused_where_there_is_none(make: Make, level: Durability) -> None:
    broadcaster = make(NOWHERE, durability="memory")
    with pytest.raises(ConfigError, match=r"durability='memory' has no file .* give it durability='process' or higher"):
        broadcaster.safe_emit({}, durability=level)
    with pytest.raises(ConfigError, match="has no file"):
        broadcaster.emit_nowait({}, durability=level)
    assert broadcaster.get_stats()["last_seq"] == 0


def test_an_unknown_setting_is_told_with_the_known_ones(spill_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"outbox_byte=1 is not allowed: .*outbox_bytes"):
        SafeBroadcaster(NOWHERE, spill_path, outbox_byte=1)


def test_config_has_to_be_one(spill_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config=\{\} is not allowed"):
        SafeBroadcaster(NOWHERE, spill_path, config={})  # type: ignore[arg-type]  # which is what a wrong program does


@pytest.mark.parametrize("path", [None, 7, "", object()])
def test_a_spill_path_that_is_none_is_refused(path: Any) -> None:
    with pytest.raises(ConfigError, match="spill_path="):
        SafeBroadcaster(NOWHERE, path)


@pytest.mark.parametrize(
    "client", [None, 7, b"ws://x/", object(), {"connect": print}], ids=lambda each: repr(each)[:20]
)
def test_a_ws_client_that_cannot_send_is_refused(spill_path: Path, client: object) -> None:
    with pytest.raises(ConfigError, match="ws_client="):
        SafeBroadcaster(client, spill_path)


def test_a_file_that_holds_no_certificate_is_no_ssl_ca(spill_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing here\n")
    with pytest.raises(ConfigError, match=r"ssl_ca=.*empty\.pem is not allowed"):
        SafeBroadcaster("wss://localhost/", spill_path, ssl_ca=tmp_path / "empty.pem")


def test_the_token_is_never_shown(spill_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        SafeBroadcaster(NOWHERE, spill_path, token="se\ncret")
    assert "cret" not in str(caught.value)
    assert "secret" not in repr(EmitterConfig(token="secret"))


def test_single_settings_win_over_config(spill_path: Path) -> None:
    broadcaster = SafeBroadcaster(NOWHERE, spill_path, config=EmitterConfig(jitter=0.1, stamp=True), jitter=0.2)
    assert (broadcaster.config.jitter, broadcaster.config.stamp) == (0.2, True)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EmitterConfig().jitter = 0.1  # type: ignore[misc]  # frozen, which is what is tested


def test_every_field_reaches_the_core() -> None:
    """The dataclass, the struct that it becomes, and the reader between them have the same fields."""
    source = Path(__file__).parents[2] / "src"
    fields = {field.name for field in dataclasses.fields(EmitterConfig)}
    reader = (source / "python" / "config.rs").read_text()
    struct = (
        (source / "emitter" / "config.rs").read_text().partition("pub struct EmitterConfig {")[2].partition("\n}")[0]
    )
    declared = {
        line.split(":")[0].removeprefix("    pub ") for line in struct.splitlines() if line.startswith("    pub ")
    }
    assert declared == fields | {"spill_path"}
    for name in fields:
        assert f'"{name}"' in reader


def test_every_field_is_documented() -> None:
    lines = Path(str(EmitterConfig.__module__.replace(".", "/"))).name
    text = (Path(__file__).parents[2] / "python" / "safe_broadcaster" / f"{lines}.py").read_text().splitlines()
    for field in dataclasses.fields(EmitterConfig):
        at = next(n for n, line in enumerate(text) if line.startswith(f"    {field.name}: "))
        assert text[at + 1].startswith('    """'), f"{field.name} has no reason"
