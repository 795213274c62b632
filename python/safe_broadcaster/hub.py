"""The hub: one port on which emitters bring events and dashboards hear them.

::

    async with EventBroadcaster(port=8000) as hub:
        await hub.broadcast("alert.disk", {"free": 0.02})
"""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

import orjson

from safe_broadcaster import _core
from safe_broadcaster.auth import AuthDesk, JwtAuth
from safe_broadcaster.exceptions import ConfigError, ConnectRefused
from safe_broadcaster.mailbox import Mailbox

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from safe_broadcaster.auth import AuthCallback

__all__ = ["EventBroadcaster", "HubConfig", "LocalClient"]

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
    session_queue_bytes: int = 1 << 20
    """Most bytes that may wait for one session; what happens to one that lets more wait says `slow`."""
    slow: Literal["disconnect", "conflate", "drop_with_gap"] = "disconnect"
    """What happens at that bound, unless the session chooses for itself. ``disconnect``: it is closed with 3008 and
    comes back for what it missed; the default, because nothing is left out. ``conflate``: of the events that wait, the
    newest of each ``key`` (else topic, else type) is kept. ``drop_with_gap``: events that find no room are left out.
    Whatever is left out is told by a ``gap`` in its place."""
    compression_threshold: int | None = 1024
    """From how many bytes on the data of an event is compressed for sessions that ask for it
    (``"compression": "deflate"`` in ``subscribe``), once for all of them. Below that there is little to gain. None:
    never."""
    max_message_bytes: int = 16 << 20
    """Largest message taken from an emitter or over ``/publish``."""
    max_sessions: int = 10_000
    """Most sessions at once; more are refused with status 503."""
    auth: str | Sequence[str] | JwtAuth | AuthCallback | None = dataclasses.field(default=None, repr=False)
    """Who may connect. None: everyone, which suits a hub that only this machine reaches. A token, or several while one
    replaces the other: whoever knows one may do everything. `JwtAuth`: signed tokens. A function, async or not, that
    takes a token and returns a `Grant`, or None to refuse; what it raises refuses too."""
    auth_timeout: float = 10.0
    """How long a session may take to show its token, and a function given as ``auth`` to check one."""
    allowed_origins: Sequence[str] = ()
    """Origins (``https://dash.example``) whose pages may connect although they were not served from here; ``*`` allows
    every page. None by default: a page of another site must not read events through its visitor's browser."""
    requires_ack: Sequence[str] = ()
    """Patterns: events that match one of them ask subscribers for an ack (``"requires_ack": true``). None by default:
    acks cost a frame each and only say how far a client is; nothing is held back for them."""
    ping_interval: float = 25.0
    """How often a session is pinged, below the 30 to 60 s after which proxies drop silent connections; one that shows
    no sign of life until the next ping is closed."""
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
        return cls(**settings)  # type: ignore[arg-type]


class LocalClient:
    """Brings events to a hub of the same process, without a socket.

    Given to ``SafeBroadcaster(hub.client)`` it carries the emitter protocol through a pipe; by hand it is a client
    like any other. It may be handed out before the hub starts and stays valid over restarts.
    """

    def __init__(self, hub: EventBroadcaster, core: _core.HubClient, running: asyncio.Event) -> None:
        self._hub = hub
        self._running = running
        self.core = core
        """The pipe, for `SafeBroadcaster`."""

    async def connect(self) -> None:
        """Raise `ConnectRefused` unless the hub is running."""
        if not self.is_available():
            raise ConnectRefused("the hub of this process is not running; start it first")

    async def wait_until_ready(self) -> None:
        """Wait until the hub is running."""
        await self._running.wait()

    def is_available(self) -> bool:
        """Whether the hub is running."""
        return self._running.is_set()

    async def send(self, event: Mapping[str, Any]) -> None:
        """Publish an event."""
        await self._hub.broadcast_event(event)


class EventBroadcaster:
    """The hub. ``port=0`` takes any free port; the settings are the fields of `HubConfig`.

    Raises `ConfigError` for an unknown setting at once, and for a value that is not allowed at `start`.
    """

    def __init__(
        self,
        redis_client: None = None,
        channel_name: str | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        **settings: Any,
    ) -> None:
        if redis_client is not None:
            raise ConfigError(
                f"redis_client={redis_client!r} is not allowed: this version has no bridge to Redis yet; leave it out"
            )
        self.config = HubConfig.build({"host": host, "port": port, **settings})
        self.channel_name = channel_name
        self._core = _core.Hub()
        auth = self.config.auth
        self._auth_desk = AuthDesk(auth) if callable(auth) else None
        self._port = port
        self._running = asyncio.Event()
        self.client = LocalClient(self, self._core.client(), self._running)
        """For `SafeBroadcaster` in the same process."""

    async def start(self) -> None:
        """Listen; connections are accepted when this returns. Starting a running hub does nothing.

        Raises `ConfigError` for a setting that is not allowed, `ConnectRefused` for an address that cannot be used,
        `SpillLocked` if another hub has the file at ``log_path``, and `SpillCorrupt` if it cannot be used.
        """
        if not self._running.is_set():
            if self._auth_desk is not None:
                self._auth_desk.serve(Mailbox.current())
            self._port = self._core.start(self.config, self._auth_desk and self._auth_desk.core)
            self._running.set()

    async def stop(self) -> None:
        """Say goodbye to every session, wait until they have heard it (at most 3 s), and free the port.

        Whoever is connected is told to come back soon (``bye``, close code 3001).
        """
        self._running.clear()
        mailbox = Mailbox.current()
        reply = mailbox.reply()
        self._core.stop(mailbox.core, reply.token)
        await reply.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        """The port that it listens on; before the start, the one that was asked for."""
        return self._port

    @property
    def url(self) -> str:
        """Where emitters and subscribers connect: ``ws://host:port/ws``.

        A hub that listens on every address of the machine is named by the loopback one.
        """
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)  # noqa: S104
        return f"ws://[{host}]:{self.port}/ws" if ":" in host else f"ws://{host}:{self.port}/ws"

    async def broadcast_event(self, data: Mapping[str, Any]) -> int:
        """Publish an event, and return the number of sessions that it matched.

        With a ``log_path`` it is stored when this returns.

        Raises `EventNotSerializable`, `EventTooLarge`, `BroadcasterClosed` if the hub is not running, or `SpillCorrupt`
        if the disk refuses it: then it was not published.
        """
        json = _core.serialize(data)
        if self.config.log_path is None:
            _, sessions = self._core.publish(json)
            return sessions
        mailbox = Mailbox.current()
        reply = mailbox.reply()
        try:
            self._core.publish_later(mailbox.core, reply.token, json)
        except BaseException:
            mailbox.unsubscribe(reply.token)
            raise
        _, sessions = await reply.wait()
        return sessions

    async def broadcast(self, type: str, data: Any, topic: str | None = None) -> int:  # noqa: A002 - the wire's name
        """Publish ``{"type": type, "data": data}``, with a topic if one is given; as `broadcast_event`."""
        event = {"type": type, "data": data}
        if topic is not None:
            event["topic"] = topic
        return await self.broadcast_event(event)

    async def publish_ready(self) -> int:
        """Publish ``bus.ready``: the services that wait for the bus may begin."""
        return await self.broadcast(
            "bus.ready", {"service": "event_broadcaster", "timestamp": datetime.now(timezone.utc).isoformat()}
        )

    def get_stats(self) -> dict[str, Any]:
        """Read the hub's numbers: ``running``, ``port``, and after the first start all that ``/stats`` tells."""
        stats: dict[str, Any] = {"running": self._running.is_set(), "port": self.port}
        numbers = self._core.stats()
        if numbers is not None:
            stats.update(orjson.loads(numbers))
        return stats

    def is_listener_healthy(self) -> bool:
        """Whether new connections are accepted."""
        return self._core.is_listening()
