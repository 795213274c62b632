"""Settings, each with its default and the reason for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["Durability", "EmitterConfig", "WhenFull"]

Durability = Literal["memory", "process", "power", "delivered"]
"""When ``safe_emit``'s await ends, and so what the event survives. ``memory``: it is in the outbox (a lost link);
``process``: the outbox is a mapped file (``kill -9`` of the process); ``power``: an fsync that covered it has returned
(power loss); ``delivered``: the hub has acknowledged it (the loss of this machine)."""

WhenFull = Literal["drop_oldest", "drop_newest", "wait", "raise"]
"""What happens at the spill's bound: the oldest event goes, the newest goes, the caller waits, or `SpillFull`."""


def _no_headers() -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class EmitterConfig:
    """Settings of a `SafeBroadcaster`. Times are seconds, sizes are bytes; a wrong value raises `ConfigError`."""

    durability: Durability = "process"
    """Level for calls that name none: what survives ``kill -9`` costs a copy into memory, as ``memory`` does. All but
    ``memory`` keep a file beside the spill, as large as four times ``outbox_bytes`` and two of the largest events."""
    emitter_id: str | None = None
    """Name towards the hub, 1 to 256 printable characters. None: a random one, kept in the spill."""
    outbox_bytes: int = 16 << 20
    """Events held in memory before awaiting callers are slowed: some 40 000 of 400 bytes, 20 ms of a full burst."""
    spill_max_events: int = 1_000_000
    """Most events in the spill: three hours of 100 events per second."""
    spill_max_bytes: int = 1 << 30
    """Most bytes of events in the spill: 1 GiB, which a laptop's disk has to spare."""
    spill_max_age: float | None = None
    """Stored events older than this are given up, with a gap in their place. None: never."""
    when_full: WhenFull = "drop_oldest"
    """Policy at those bounds. A dashboard wants the present, so the oldest go first; a gap record tells of them."""
    poison_tries: int = 3
    """How often the peer may refuse an event before it is parked and the rest goes on: a hub that is being replaced has
    another chance, and what is behind waits for some seconds only."""
    parked_max_events: int = 1000
    """Most parked events; the oldest make room. People look at them, and read no more than that."""
    parked_max_bytes: int = 64 << 20
    """Most bytes of parked events: 64 MiB, small beside the spill. The newest stays even if it is larger."""
    backoff_initial: float = 1.0
    """First pause before connecting again; doubles with each failure."""
    backoff_max: float = 30.0
    """Longest pause: an operator who restarts a hub sees events within half a minute."""
    backoff_multiplier: float = 2.0
    """Growth of the pause with each failure."""
    jitter: float = 0.3
    """Random share of each pause, so that a fleet does not come back in step."""
    connect_timeout: float = 10.0
    """Longest time for connecting, TLS and handshake together."""
    ack_timeout: float = 30.0
    """Longest time that a link with unconfirmed events may show no progress: late is not dead."""
    ping_interval: float = 20.0
    """Idle time after which a Ping is sent, below the usual minute at which gateways cut idle connections."""
    breaker_threshold: int = 5
    """Links lost in a row without one confirmation before the breaker opens."""
    breaker_cooldown: float = 30.0
    """How long the open breaker forbids attempts."""
    report_interval: float = 1.0
    """Least time between two reports of the same ongoing trouble."""
    max_event_bytes: int = 1 << 20
    """Largest event as JSON; at most ``outbox_bytes``."""
    headers: Mapping[str, str] = field(default_factory=_no_headers)
    """Extra HTTP headers of the WebSocket handshake."""
    token: str | None = field(default=None, repr=False)
    """Sent as ``Authorization: Bearer …``; never logged."""
    ssl_ca: str | os.PathLike[str] | None = None
    """PEM file of certificate authorities to trust instead of the system's."""
    stamp: bool = False
    """Put ``{"_sb": {"emitter", "epoch", "seq"}}`` into events for a server that does not speak our protocol, so that
    it can drop duplicates and see gaps."""
    flush_rate: float | None = None
    """Most spilled events sent per second. None: as fast as the peer confirms them."""
    slo_emit_success_rate: float = 0.99
    """Lowest share of events accepted while the link is live, over one minute."""
    slo_spill_depth: int = 100
    """Spill depth at which a breach of ``slo_spill_depth_alert`` is over."""
    slo_spill_depth_alert: int = 1000
    """Spill depth above which the objective is breached."""
    slo_flush_latency: float = 5.0
    """Longest time from a link that is back to an empty spill."""

    @classmethod
    def build(cls, config: EmitterConfig | None, settings: Mapping[str, object]) -> EmitterConfig:
        """Combine a ready config with single settings, which win."""
        known = {each.name for each in dataclasses.fields(cls)}
        for name, value in settings.items():
            if name not in known:
                allowed = ", ".join(sorted(known))
                raise ConfigError(f"{name}={value!r} is not allowed: there is no such setting; there are {allowed}")
        if config is not None and not isinstance(config, EmitterConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"config={config!r} is not allowed: give an EmitterConfig")
        return dataclasses.replace(config or cls(), **settings)  # type: ignore[arg-type]
