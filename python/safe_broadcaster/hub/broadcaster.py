"""The hub's handle: starting, stopping, broadcasting, and looking at it."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from safe_broadcaster import _core
from safe_broadcaster.auth import AuthDesk
from safe_broadcaster.breaker import WebSocketCircuitState
from safe_broadcaster.exceptions import ConfigError
from safe_broadcaster.hub.asgi import HubApp
from safe_broadcaster.hub.client import LocalClient
from safe_broadcaster.hub.config import HubConfig
from safe_broadcaster.hub.events import EventRegistry
from safe_broadcaster.hub.redis_url import redis_settings
from safe_broadcaster.hub.sessions import Sessions
from safe_broadcaster.hub.supervision import Supervisor
from safe_broadcaster.hub.typed import TypedBroadcasts
from safe_broadcaster.mailbox import Mailbox
from safe_broadcaster.retry import BroadcastRetryMetrics, broadcast_with_retry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from safe_broadcaster.hub.sessions import WebSocket

__all__ = ["EventBroadcaster"]

T = TypeVar("T")

_MISSING: Any = object()
_SEVERITY = [WebSocketCircuitState.CLOSED, WebSocketCircuitState.HALF_OPEN, WebSocketCircuitState.OPEN]

_CLIENTS = 1000
"""Most subscribers that the numbers name one by one: those that are furthest behind."""


class EventBroadcaster(TypedBroadcasts):
    """The hub. ``port=0`` takes any free port; the settings are the fields of `HubConfig`.

    Hubs that are given the same Redis and ``channel_name`` share one stream of events and its positions: what is
    published at one reaches the subscribers of all, and a subscriber or emitter may come back at any of them.

    Args:
        redis_client: A ``redis://`` URL, or a ``redis.asyncio.Redis``, which is only asked where its server is. None:
            this hub is alone.
        channel_name: See `HubConfig.channel_name`.
        host: Address or host name to listen on.
        port: TCP port.
        settings: The other fields of `HubConfig`.

    Raises `ConfigError` for an unknown setting at once, and for a value that is not allowed at `start`.
    """

    def __init__(
        self,
        redis_client: object = None,
        channel_name: str | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        **settings: Any,
    ) -> None:
        settings |= redis_settings(redis_client)
        if channel_name is not None:
            settings["channel_name"] = channel_name
        self.config = HubConfig.build({"host": host, "port": port, **settings})
        self.channel_name = self.config.channel_name
        self._core = _core.Hub()
        auth = self.config.auth
        self._auth_desk = AuthDesk(auth) if callable(auth) else None
        self._port = port
        self._running = asyncio.Event()
        self._starting: asyncio.Event | None = None
        self._supervisor: Supervisor | None = None
        self._sessions = Sessions(self._core)
        self.events = EventRegistry()
        """Models of events that this program broadcasts; empty until you register some."""
        self.broadcast_metrics = BroadcastRetryMetrics()
        """What `broadcast_with_retry` has counted for this hub."""
        self.client = LocalClient(self, self._core.client(), self._running)
        """For `SafeBroadcaster` in the same process."""

    async def start(self) -> None:
        """Listen; connections are accepted when this returns. Starting a running hub does nothing.

        A Redis that is away is tried again for ``bus_timeout``. After that ``bus_down="local"`` begins without it,
        degraded; otherwise `BusUnavailable` is raised, as it is at once where Redis refuses the password, or the user
        lacks a right. A start that is cancelled leaves nothing behind.

        Raises `ConfigError` for a setting that is not allowed, `ConnectRefused` for an address that cannot be used,
        `SpillLocked` if another hub has the file at ``log_path``, `SpillCorrupt` if it cannot be used, and
        `BroadcasterClosed` if it is stopped meanwhile.
        """
        while self._starting is not None:
            await self._starting.wait()  # somebody else's
        if self._running.is_set():
            return
        self._starting = ended = asyncio.Event()
        try:
            await self._start()
        finally:
            self._starting = None
            ended.set()

    async def _start(self) -> None:
        supervisor = Supervisor(self._core, self.config)
        if self._auth_desk is not None:
            self._auth_desk.serve(Mailbox.current())
        desk = self._auth_desk and self._auth_desk.core
        if self.config.redis_url is None:
            self._port = self._core.start(self.config, desk)
        else:  # waits for the network
            try:
                self._port = await asyncio.to_thread(self._core.start, self.config, desk)
            except asyncio.CancelledError:
                self._core.abort_start()
                raise
        self._running.set()
        supervisor.start()
        self._supervisor = supervisor

    async def stop(self) -> None:
        """Say goodbye to every session, wait until they have heard it (at most 3 s), and free the port.

        Whoever is connected is told to come back soon (``bye``, close code 3001).
        """
        self._running.clear()
        if self._supervisor is not None:
            await self._supervisor.stop()
        mailbox = Mailbox.current()
        reply = mailbox.reply()
        self._core.stop(mailbox.core, reply.token)
        await reply.wait()
        if self._auth_desk is not None:
            self._auth_desk.stop()

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
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)  # noqa: S104 - read, not bound
        scheme = "ws" if self.config.tls_cert is None else "wss"
        return f"{scheme}://[{host}]:{self.port}/ws" if ":" in host else f"{scheme}://{host}:{self.port}/ws"

    async def broadcast_event(self, data: Mapping[str, Any]) -> int:
        """Publish an event, and return the number of sessions that it matched; with Redis, of hubs that it was sent to.

        With a ``log_path``, or with Redis, it is stored there when this returns.

        An event whose type has a model in `events` is checked first, and sent as the model gives it.

        Raises `EventInvalid`, `EventNotSerializable`, `EventTooLarge`, `BroadcasterClosed` if the hub is not running,
        or `SpillCorrupt` if the disk refuses it: then it was not published. `BusUnavailable` if Redis did not take it
        within ``bus_timeout``; the error tells whether it may have been published all the same.
        """
        json = _core.serialize(self.events.validate(data))
        if self.config.log_path is None and self.config.redis_url is None:
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

    async def broadcast(
        self,
        type: str | Mapping[str, Any],  # noqa: A002 - the wire's name
        data: Any = _MISSING,
        topic: str | None = None,
    ) -> int:
        """Publish ``{"type": type, "data": data}``, with a topic if one is given; as `broadcast_event`.

        A whole event alone is published as it is, so that the hub fits where a WebSocket manager is expected.
        """
        if not isinstance(type, str):
            if data is not _MISSING or topic is not None:
                raise ConfigError("data= or topic= is not allowed beside a whole event: put them into it")
            return await self.broadcast_event(type)
        if data is _MISSING:
            raise ConfigError(
                f"data= is missing for an event of type {type!r}: give it, None if there is nothing to say"
            )
        event = {"type": type, "data": data}
        if topic is not None:
            event["topic"] = topic
        return await self.broadcast_event(event)

    async def publish_ready(self) -> int:
        """Publish ``bus.ready``: the services that wait for the bus may begin."""
        return await self.broadcast(
            "bus.ready", {"service": "event_broadcaster", "timestamp": datetime.now(timezone.utc).isoformat()}
        )

    def get_connection_count(self) -> int:
        """Return how many subscribers are connected; 0 before the first start."""
        numbers = self._core.stats()
        return 0 if numbers is None else int(orjson.loads(numbers)["subscribers"])

    @property
    def active_connections(self) -> list[int]:
        """The subscribers that are connected, by the numbers of their sessions."""
        return [client["session"] for client in orjson.loads(self._core.clients(self.config.max_sessions))]

    def get_stats(self) -> dict[str, Any]:
        """Read the hub's numbers: ``running``, ``port``, and after the first start all that ``/stats`` tells.

        ``clients`` names subscribers, the 1000 that are furthest behind: ``session``, ``acked`` (the last seq it said
        it has processed, or None), ``lag`` (how many offsets lie between that and the last event queued for it, or
        None), ``queued_bytes``.
        """
        stats: dict[str, Any] = {"running": self._running.is_set(), "port": self.port}
        numbers = self._core.stats()
        if numbers is not None:
            stats.update(orjson.loads(numbers))
            stats["clients"] = orjson.loads(self._core.clients(_CLIENTS))
        return stats

    def get_broadcast_metrics(self) -> dict[str, Any]:
        """Return what `broadcast_with_retry` has counted, see `BroadcastRetryMetrics`."""
        return self.broadcast_metrics.to_dict()

    def get_circuit_state(self) -> WebSocketCircuitState:
        """Return the worse state of two breakers: of the port, if it was lost, and of the connection to Redis."""
        port = self._supervisor.breaker.get_state() if self._supervisor else WebSocketCircuitState.CLOSED
        bridge = WebSocketCircuitState(self._bridge().get("circuit", "closed"))
        return max(port, bridge, key=_SEVERITY.index)

    def is_listener_healthy(self) -> bool:
        """Whether new connections are accepted and, with Redis, what is sent through it comes back."""
        return self._core.is_listening() and bool(self._bridge().get("up", True))

    def is_degraded(self) -> bool:
        """Whether something fails that clients rely on.

        The port cannot be taken again, the log refuses events, or Redis cannot be reached.
        """
        if self._supervisor is not None and self._supervisor.degraded:
            return True
        numbers = self._core.stats()
        return numbers is not None and bool(orjson.loads(numbers)["degraded"])

    def _bridge(self) -> dict[str, Any]:
        """The numbers of the bridge; none before the first start, or without Redis."""
        numbers = self._core.stats()
        return (numbers is not None and orjson.loads(numbers)["bridge"]) or {}

    def get_messages_since(
        self, last_sequence: int, mark_as_replay: bool = False, *, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """Return what the log still has after a seq, oldest first, as subscribers get it.

        This promises nothing about what the log has lost; clients that subscribe with ``since`` are told.

        Args:
            last_sequence: The last seq that is known; 0 for all.
            mark_as_replay: Whether the messages say ``"replay": true``.
            limit: Most messages returned; ask again with the last one's seq for more.

        Returns:
            Messages ``{"type": "event", "seq": …, "prev": …, "data": {…}}``, and gaps. Empty before the first start.

        """
        frames = self._core.frames_since(max(last_sequence, 0), max(limit, 0), mark_as_replay)
        return [orjson.loads(frame) for frame in frames]

    async def connect(self, websocket: WebSocket, *, events: Sequence[str] = ("*",)) -> None:
        """Accept a client of your own server's, and send it events from now on.

        For an endpoint that reads by itself, as with FastAPI::

            await hub.connect(websocket)
            try:
                while True:
                    await hub.handle_message(websocket, await websocket.receive_text())
            except WebSocketDisconnect:
                await hub.disconnect(websocket)

        The session has the bounds and answers of those on the hub's own port. An endpoint that has accepted the client
        already may connect it all the same.

        Args:
            websocket: A ``WebSocket`` of Starlette or FastAPI.
            events: Patterns of what it gets until it subscribes by itself (which takes `handle_message`). All by
                default; empty for nothing. Where clients show tokens, what of that its token grants, once it has.

        Raises:
            ConnectRefused: The client is not let in (origin, ``max_sessions``), and was told so.
            BroadcasterClosed: The hub is not running.
            ConfigError: One of ``events`` is no pattern.

        """
        await self._sessions.connect(websocket, events)

    register = connect

    async def serve(self, websocket: WebSocket, *, events: Sequence[str] = ()) -> None:
        """Accept a client of your own server's and do everything until it is gone, as ``/ws`` of the hub's port does.

        Args:
            websocket: A ``WebSocket`` of Starlette or FastAPI.
            events: As for `connect`, but nothing by default: such a client subscribes.

        Raises:
            ConnectRefused: As for `connect`.
            BroadcasterClosed: As for `connect`.
            ConfigError: As for `connect`.

        """
        await self._sessions.serve(websocket, events)

    async def handle_message(self, websocket: WebSocket, message: str | bytes) -> None:
        """Hand over what a connected client said: subscriptions, acks, pings. Answers go to the client.

        Ignored for one that is not connected: it has just gone.
        """
        await self._sessions.handle_message(websocket, message)

    async def disconnect(self, websocket: WebSocket) -> None:
        """End a client's session, and close its WebSocket if it is still open. Not connected is fine."""
        await self._sessions.disconnect(websocket)

    unregister = disconnect

    def record_ack(self, websocket: WebSocket, sequence: int) -> None:
        """Note that a connected client has processed everything up to a seq, where it did not say so in its own frame.

        Cumulative: an older one changes nothing. One beyond the last event sent is answered to the client as an error.
        """
        self._sessions.record_ack(websocket, sequence)

    def asgi(self) -> HubApp:
        """Return the routes of the hub's own port as an ASGI application, for ``app.mount("/hub", hub.asgi())``.

        Mounted, it leaves starting and stopping to you; as the server's root application it does both.
        """
        return HubApp(self, self._core)

    async def broadcast_with_retry(self, broadcast_func: Callable[[], Awaitable[T]], message_type: str) -> T:
        """Call `safe_broadcaster.broadcast_with_retry` with its defaults, counted in `broadcast_metrics`."""
        return await broadcast_with_retry(broadcast_func, message_type, metrics=self.broadcast_metrics)
