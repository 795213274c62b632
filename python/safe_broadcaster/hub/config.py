"""The settings of a hub, each with its default and the reason for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from safe_broadcaster.auth import AuthCallback, JwtAuth

__all__ = ["HubConfig"]

_PAGE = "<!doctype html><title>safe-broadcaster</title><p>The hub is running. Its numbers: <a href=stats>stats</a>."


@dataclass(frozen=True)
class HubConfig:
    """Settings of an `EventBroadcaster`. Times are seconds, sizes are bytes; a wrong value raises `ConfigError`."""

    host: str = "127.0.0.1"
    """Address or host name to listen on. Other machines must be let in on purpose."""
    port: int = 8000
    """TCP port; 0 takes any free one, see `EventBroadcaster.port`."""
    replay_events: int = 10_000
    """Most events kept for subscribers that come back: minutes of a busy dashboard."""
    replay_bytes: int = 16 << 20
    """Most bytes kept for them: large events must not make 10 000 of them unaffordable."""
    replay_age: float | None = None
    """How long an event is kept at most. None: no limit of time."""
    log_path: str | os.PathLike[str] | None = None
    """File of the durable log. With it, events that were acknowledged, positions, and what is known of emitters survive
    a restart and ``kill -9``; a loss of power ends the epoch. None: all that lives in memory."""
    redis_url: str | None = dataclasses.field(default=None, repr=False)
    """Redis (6.2 or newer) over which several hubs share one stream of events: ``redis://[user:password@]host[:port][/db]``,
    ``rediss://…`` with TLS, ``redis+unix:///path``. What is given as ``redis_client`` sets it. None: this hub is
    alone. Not together with ``log_path``: the stream in Redis is the log then. It has the bounds of the replay, but
    keeps the last 10 000 events or 64 MiB of them at least, for hubs that have to connect anew."""
    redis_ca: str | os.PathLike[str] | None = None
    """PEM file of the certificates that a ``rediss://`` server's is checked against. None: the system's."""
    channel_name: str = "safe_broadcaster"
    """Name of the stream, so that applications which share a Redis do not hear each other, and of the channel on which
    others may publish JSON."""
    bus_down: Literal["wait", "local"] = "wait"
    """What happens while Redis cannot be reached for longer than ``bus_timeout``. ``wait``: emitters keep their events
    and `broadcast_event` raises `BusUnavailable`; the default, because nothing is lost. ``local``: events go to the
    sessions of this hub, under an epoch of their own; other hubs never get them."""
    bus_timeout: float = 5.0
    """How long an event may wait for Redis before its publisher is told: a restart of Redis is no news, and a caller is
    not held up for long. Also for how long a start tries to reach it; ``bus_down="local"`` begins without it then."""
    probe_interval: float = 2.0
    """How often the hub sends itself a message through Redis. If one has not come back when the next is due the
    connection is deaf: it is made anew, and clients are told."""
    session_queue_bytes: int = 1 << 20
    """Most bytes that may wait for one session; what happens to one that lets more wait says `slow`."""
    slow: Literal["disconnect", "conflate", "drop_with_gap"] = "disconnect"
    """What happens at that bound, unless the session chooses for itself. ``disconnect``: it is closed with 3008 and
    comes back for what it missed; the default, because nothing is left out. ``conflate``: of the events that wait, the
    newest of each ``key`` (else topic, else type) is kept. ``drop_with_gap``: events that find no room are left out.
    Whatever is left out is told by a ``gap`` in its place."""
    envelope: Literal["event", "raw"] = "event"
    """What brings an event to a subscriber over a WebSocket. ``event``: a frame with its ``seq`` and ``prev``, by which
    a client proves that nothing is missing, and recovers. ``raw``: the event alone, for pages that know nothing else;
    such a page is told neither gaps nor trouble, nor a goodbye, and cannot know that it missed something."""
    compression_threshold: int | None = 1024
    """From how many bytes on the data of an event is compressed for sessions that ask for it (``"compression":
    "deflate"`` in ``subscribe``), once for all of them. Below that there is little to gain. None: never."""
    max_message_bytes: int = 16 << 20
    """Largest message taken from an emitter or over ``/publish``."""
    max_sessions: int = 10_000
    """Most sessions at once; more are refused with status 503."""
    max_sessions_per_address: int | None = None
    """Most sessions of one address; more are refused with status 429. None: behind a proxy all clients have its
    address."""
    connect_rate: float = 5000.0
    """Most sessions that begin in a second, and as many at once; more are refused with status 503 and come back. A
    fleet of 10 000 that comes back as it is told to is half as fast. Connections of any kind are accepted at twice that
    pace; more of them wait in the system's backlog."""
    frame_rate: float = 500.0
    """Most frames of a subscriber in a second, and twice as many at once, pings, pongs and fragments included (behind
    an ASGI server: messages); beyond that it is closed with 3503."""
    max_subscriber_message_bytes: int = 64 << 10
    """Largest message taken from a subscriber: hundreds of patterns. One that is never finished costs no more."""
    auth: str | Sequence[str] | JwtAuth | AuthCallback | None = dataclasses.field(default=None, repr=False)
    """Who may connect. None: everyone, which suits a hub that only this machine reaches. A token, or several while one
    replaces the other: whoever knows one may do everything. `JwtAuth`: signed tokens. A function, async or not, that
    takes a token and returns a `Grant`, or None to refuse; what it raises refuses too."""
    auth_timeout: float = 10.0
    """How long a session may take to show its token, and a function given as ``auth`` to check one."""
    tls_cert: str | os.PathLike[str] | None = None
    """PEM file of a certificate and those that lead to its issuer: the port then speaks TLS (``wss://``). Read again
    when it changes; one that cannot be used leaves the old one in place and is told as ``tls_error`` in the stats."""
    tls_key: str | os.PathLike[str] | None = None
    """PEM file of the private key that belongs to it."""
    allowed_origins: Sequence[str] = ()
    """Origins (``https://dash.example``) whose pages may connect although they were not served from here; ``*`` allows
    every page. None by default: a page of another site must not read events through its visitor's browser."""
    requires_ack: Sequence[str] = ()
    """Patterns: events that match one of them ask subscribers for an ack (``"requires_ack": true``). None by default:
    acks cost a frame each and only say how far a client is; nothing is held back for them."""
    entity_keys: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    """Fields of an event, or of its ``data``, that hold ids (texts or whole numbers, one or a list), and the topics
    that the ids stand for: ``{"characteristic_ids": "characteristic/{id}"}``. An event then matches subscriptions to
    each of those topics as to its own. None by default: what is not set costs nothing."""
    presence_events: Sequence[str] = ("graph.delta.heartbeat", "presence.beacon")
    """Patterns of the heartbeats of engines. Whoever has sent one is watched, by emitter and topic: that it goes on is
    promised then. Empty: nobody is watched."""
    presence_late: float = 45.0
    """Silence after which an engine is late (``presence.late``): a heartbeat each 30 s, and half that for the way."""
    presence_dead: float = 60.0
    """Silence after which it is dead (``presence.dead``, an alert): two heartbeats did not come."""
    ping_interval: float = 25.0
    """How often a session is pinged, below the 30 to 60 s after which proxies drop silent connections; one that shows
    no sign of life until the next ping is closed."""
    supervision_interval: float = 30.0
    """How often the hub looks whether its port still accepts connections, and takes it anew if not."""
    max_recovery_attempts: int = 5
    """Attempts in vain after which it is degraded, and says so to everyone (``service_status``). The same number of
    attempts to reach Redis in vain opens the bridge's breaker."""
    breaker_cooldown: float = 30.0
    """Pause of those attempts after so many failed; at most 5 s for Redis, which may be back any moment."""
    page: str = dataclasses.field(default=_PAGE, repr=False)
    """HTML of ``/``."""

    @classmethod
    def build(cls, settings: Mapping[str, object]) -> HubConfig:
        """Make a config of single settings, and refuse unknown ones by name."""
        known = {each.name for each in dataclasses.fields(cls)}
        for name, value in settings.items():
            if name not in known:
                allowed = ", ".join(sorted(known))
                raise ConfigError(f"{name}={value!r} is not allowed: there is no such setting; there are {allowed}")
        return cls(**settings)  # type: ignore[arg-type]  # the core checks the values
