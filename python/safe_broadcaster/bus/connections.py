"""WebSocket clients of an application: who is there, who wants what, and everything that is sent to them.

::

    manager = ConnectionManager()


    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket):
        await manager.serve(websocket)


    await manager.broadcast({"type": "status", "payload": {"up": True}})
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from safe_broadcaster import _core
from safe_broadcaster.bus.connection import Connection, Socket
from safe_broadcaster.bus.messages import BadMessage, parse
from safe_broadcaster.checks import check_choice, check_count, check_seconds, check_timeout
from safe_broadcaster.deadlines import end_tasks, is_alive
from safe_broadcaster.exceptions import BroadcastError, ConfigError, ConnectRefused
from safe_broadcaster.hub.sessions import is_connecting
from safe_broadcaster.metrics import Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, MutableMapping
    from types import TracebackType

    from typing_extensions import Self

    from safe_broadcaster.hub import EventBroadcaster

__all__ = ["ConnectionManager", "ManagerConfig"]

logger = logging.getLogger(__name__)

Slow = Literal["disconnect", "drop_oldest"]

_PING = '{"type":"ping"}'
_PONG = '{"type":"pong"}'
_SLOW, _SILENT, _STOPS, _FULL = 3008, 3012, 3001, 1013
"""Close codes, as the hub has them; the last is the registered "try again later"."""


@dataclass(frozen=True)
class ManagerConfig:
    """Settings of a `ConnectionManager`. Times are seconds; a wrong value raises `ConfigError`."""

    ping_interval: float = 30.0
    """How often each client is pinged (``{"type":"ping"}``): below the minute after which proxies drop silent
    connections. A client for which the server could not take the last one by then reads nothing, and is closed."""
    client_timeout: float | None = None
    """How long a client may say nothing. None: for ever, as many pages only listen. 90 where clients ping every 30."""
    max_connections: int = 10_000
    """Most clients at once; more are refused."""
    max_subscriptions: int = 10_000
    """Most characteristics that one client may subscribe to."""
    queue_size: int = 1000
    """Most messages that wait for one client."""
    slow: Slow = "disconnect"
    """What happens at that bound. ``disconnect``: closed with 3008; it comes back and asks for the present state.
    ``drop_oldest``: the oldest go, and ``{"type":"gap","payload":{"dropped":n}}`` stands in their place."""
    batch_interval: float | None = None
    """How long messages for a client are gathered and then sent as one, ``{"type":"batch","payload":[…]}``. None: each
    by itself, at once, which every client understands. 0.05 where there are hundreds a second."""

    def __post_init__(self) -> None:
        """Refuse what is not allowed."""
        check_seconds("ping_interval", self.ping_interval)
        for setting in ("client_timeout", "batch_interval"):
            check_timeout(setting, getattr(self, setting))
        for setting in ("max_connections", "max_subscriptions", "queue_size"):
            check_count(setting, getattr(self, setting))
        check_choice("slow", self.slow, get_args(Slow))


class ReceivingSocket(Socket, Protocol):
    """What `ConnectionManager.serve` needs besides."""

    async def receive(self) -> MutableMapping[str, Any]: ...


class ConnectionManager:
    """Clients, their subscriptions, and what is sent to them.

    Each client has a bounded queue and a task of its own, so none holds up another or whoever broadcasts, and everyone
    gets messages in the order of the calls. A message is encoded once.

    Args:
        hub: Also publish everything there, with the topic ``characteristic/<id>`` where it is for subscribers: clients
            of the hub hear it with positions and recovery. None: nowhere else.
        settings: The fields of `ManagerConfig`.

    Raises:
        ConfigError: A setting is unknown or has a value that is not allowed.

    """

    def __init__(self, *, hub: EventBroadcaster | None = None, **settings: Any) -> None:
        known = {each.name for each in dataclasses.fields(ManagerConfig)}
        for name, value in settings.items():
            if name not in known:
                allowed = ", ".join(sorted(known))
                raise ConfigError(f"{name}={value!r} is not allowed: there is no such setting; there are {allowed}")
        self.config = ManagerConfig(**settings)
        self.hub = hub
        self._lock = threading.Lock()
        self._connections: dict[int, Connection] = {}
        self._subscribers: dict[str, set[Connection]] = {}
        self._heartbeat: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._broadcasts = self._dropped = self._slow = 0

    async def start(self) -> None:
        """Ping clients from now on; the first client does the same."""
        if not is_alive(self._heartbeat):
            self._heartbeat = asyncio.create_task(self._beat(), name="safe_broadcaster connections")

    async def stop(self) -> None:
        """Send every client away with 3001, which means that it may come back; what waits for it is sent first."""
        task, self._heartbeat = self._heartbeat, None
        if task is not None:
            await end_tasks([task])
        ending = [self._end(connection, _STOPS, "the server stops", drain_timeout=1.0) for connection in self._all()]
        await _ended(ending)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def connect(self, websocket: Socket) -> None:
        """Accept a client (unless that was done) and send it what concerns it from now on.

        Raises:
            ConnectRefused: ``max_connections`` are there already; the client was told 1013, try again later.

        """
        if self._has_room(websocket):
            await self.start()
            if is_connecting(websocket):
                await websocket.accept()
            with self._lock:  # others may have come while it was accepted
                if self._has_room(websocket):
                    if id(websocket) not in self._connections:
                        self._connections[id(websocket)] = Connection(websocket, self.config, self._end)
                    return
        await websocket.close(_FULL, "too many connections")
        raise ConnectRefused(f"there are {self.config.max_connections} connections already (max_connections)")

    async def disconnect(self, websocket: Socket) -> None:
        """Forget a client, and close its socket if it is open."""
        connection = self._connections.get(id(websocket))
        if connection is not None:
            await _ended([self._end(connection, 1000, "goodbye")])

    async def serve(self, websocket: ReceivingSocket) -> None:
        """Do all of it for a client, until it is gone."""
        await self.connect(websocket)
        try:
            while (message := await websocket.receive())["type"] != "websocket.disconnect":
                if message["type"] == "websocket.receive":
                    text = message.get("text")
                    await self.handle_message(websocket, message["bytes"] if text is None else text)
        finally:
            await self.disconnect(websocket)

    async def handle_message(self, websocket: Socket, message: str | bytes | Mapping[str, Any]) -> None:
        """Do what a client says; it is answered, and told by an ``error`` what was wrong with it.

        ============================================================  =============================================
        ``{"type":"subscribe","characteristic_ids":[5, "x"]}``        more of them; answered by ``subscribed``
        ``{"type":"unsubscribe","characteristic_ids":[5]}``           fewer; answered by ``unsubscribed``
        ``{"type":"ping"}``                                           answered by ``pong``
        ``{"type":"pong"}``                                           a sign of life
        ============================================================  =============================================
        """
        connection = self._connections.get(id(websocket))
        if connection is None:
            return
        connection.heard = connection.loop.time()
        try:
            said = parse(message)
            if said.kind == "ping":
                connection.put(_PONG)
            elif said.kind == "subscribe":
                self._subscribe(connection, said.ids)
                self._answer(connection, "subscribed")
            elif said.kind == "unsubscribe":
                self._unsubscribe(connection, said.ids)
                self._answer(connection, "unsubscribed")
        except BadMessage as error:
            connection.put(_encode({"type": "error", "payload": {"message": str(error)}}))

    async def subscribe(self, websocket: Socket, characteristic_ids: Iterable[Any]) -> None:
        """Have a client hear of more characteristics; ``5`` and ``"5"`` are the same.

        Raises:
            ConfigError: It has ``max_subscriptions`` already, or an id is none. Nothing was subscribed.

        """
        connection = self._connections.get(id(websocket))
        if connection is not None:
            try:
                self._subscribe(connection, parse({"type": "subscribe", "characteristic_ids": characteristic_ids}).ids)
            except BadMessage as error:
                raise ConfigError(f"characteristic_ids={characteristic_ids!r} is not allowed: {error}") from None

    async def unsubscribe(self, websocket: Socket, characteristic_ids: Iterable[Any]) -> None:
        """Have a client hear of fewer."""
        connection = self._connections.get(id(websocket))
        if connection is not None:
            self._unsubscribe(connection, [str(each) for each in characteristic_ids])

    async def broadcast(self, message: Mapping[str, Any]) -> int:
        """Send a message to every client, and return to how many.

        Raises:
            EventNotSerializable: It cannot be JSON. Nothing was sent.

        """
        return self._deliver(self._all(), message) + await self._publish(message)

    async def broadcast_to_characteristic(self, characteristic_id: Any, message: Mapping[str, Any]) -> int:
        """Send a message to those that subscribed to this characteristic, and return to how many.

        Raises:
            EventNotSerializable: It cannot be JSON. Nothing was sent.

        """
        with self._lock:
            subscribers = list(self._subscribers.get(str(characteristic_id), ()))
        topic = f"characteristic/{characteristic_id}"
        return self._deliver(subscribers, message) + await self._publish({**message, "topic": topic})

    async def send(self, websocket: Socket, message: Mapping[str, Any]) -> bool:
        """Send a message to one client; False if it is gone."""
        connection = self._connections.get(id(websocket))
        return connection is not None and self._deliver([connection], message) == 1

    def get_connection_count(self) -> int:
        """Return how many clients there are."""
        return len(self._connections)

    @property
    def active_connections(self) -> list[Socket]:
        """The clients' sockets; empty when nobody listens."""
        return [connection.websocket for connection in self._all()]

    def get_stats(self) -> dict[str, float]:
        """Return ``connections``, ``subscriptions``, ``queued`` messages and ``longest_silence`` now.

        The last is in seconds, of the client that was heard of least recently. Since the start: ``broadcasts``,
        messages ``dropped`` before slow clients, and clients sent away as ``slow``.
        """
        connections = self._all()
        return {
            "connections": len(connections),
            "subscriptions": sum(len(each.subscriptions) for each in connections),
            "queued": sum(len(each.inbox) for each in connections),
            "longest_silence": max((each.loop.time() - each.heard for each in connections), default=0.0),
            "broadcasts": self._broadcasts,
            "dropped": self._dropped + sum(each.inbox.dropped for each in connections),
            "slow": self._slow,
        }

    def metrics(self) -> Iterator[Metric]:
        """Yield the numbers for `safe_broadcaster.export`."""
        stats = self.get_stats()
        yield Metric("connections", "gauge", "WebSocket clients.", stats["connections"])
        yield Metric("connection_subscriptions", "gauge", "Their subscriptions.", stats["subscriptions"])
        yield Metric("connection_queued", "gauge", "Messages that wait for them.", stats["queued"])
        silence = stats["longest_silence"]
        yield Metric("connection_silence_seconds", "gauge", "Of the client that is silent for longest.", silence)
        yield Metric("connection_broadcasts", "counter", "Messages that were broadcast.", stats["broadcasts"])
        yield Metric("connection_dropped", "counter", "Messages that slow clients did not get.", stats["dropped"])
        yield Metric("connection_slow", "counter", "Clients that were sent away as slow.", stats["slow"])

    def _has_room(self, websocket: Socket) -> bool:
        return len(self._connections) < self.config.max_connections or id(websocket) in self._connections

    def _all(self) -> list[Connection]:
        with self._lock:
            return list(self._connections.values())

    def _deliver(self, connections: Iterable[Connection], message: Mapping[str, Any]) -> int:
        text = _encode(message)
        self._broadcasts += 1
        return sum(connection.put(text) for connection in connections)

    async def _publish(self, event: Mapping[str, Any]) -> int:
        if self.hub is None:
            return 0
        try:
            return await self.hub.broadcast_event(event)
        except BroadcastError as error:
            logger.error("the hub did not take a message of type %s: %s", event.get("type"), error)  # noqa: TRY400 - it says all
            return 0

    def _subscribe(self, connection: Connection, ids: list[str]) -> None:
        with self._lock:
            if self._connections.get(id(connection.websocket)) is not connection:
                return  # sent away meanwhile by a broadcast on another thread
            if len(connection.subscriptions.union(ids)) > self.config.max_subscriptions:
                raise BadMessage(f"at most {self.config.max_subscriptions} characteristics for one connection")
            connection.subscriptions.update(ids)
            for each in ids:
                self._subscribers.setdefault(each, set()).add(connection)

    def _unsubscribe(self, connection: Connection, ids: Iterable[str]) -> None:
        with self._lock:
            for each in ids:
                connection.subscriptions.discard(each)
                subscribers = self._subscribers.get(each, set())
                subscribers.discard(connection)
                if not subscribers:
                    self._subscribers.pop(each, None)

    def _answer(self, connection: Connection, kind: str) -> None:
        connection.put(_encode({"type": kind, "payload": {"characteristic_ids": sorted(connection.subscriptions)}}))

    def _end(
        self, connection: Connection, code: int, reason: str, drain_timeout: float = 0.0
    ) -> asyncio.Task[None] | None:
        """Forget a client at once; a task of its own loop closes the socket. It is returned if that is this loop."""
        with self._lock:
            if self._connections.get(id(connection.websocket)) is not connection:
                return None
            del self._connections[id(connection.websocket)]
        self._unsubscribe(connection, list(connection.subscriptions))
        self._dropped += connection.inbox.dropped
        if code == _SLOW:
            self._slow += 1
            waiting = len(connection.inbox)
            text = "a client reads too slowly and is sent away: %d messages wait"
            logger.warning(text, waiting, extra={"waiting": waiting, "code": code})

        def close() -> asyncio.Task[None]:
            task = asyncio.get_running_loop().create_task(connection.close(code, reason, drain_timeout=drain_timeout))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            return task

        if _is_running(connection.loop):
            return close()
        if not connection.loop.is_closed():
            connection.loop.call_soon_threadsafe(close)
        return None

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.config.ping_interval)
            limit = self.config.client_timeout
            for connection in self._all():
                if connection.is_stuck(self.config.ping_interval):
                    self._end(connection, _SILENT, "takes nothing")
                elif limit is not None and connection.loop.time() - connection.heard > limit:
                    self._end(connection, _SILENT, "said nothing for too long")
                else:
                    connection.put(_PING)


def _encode(message: Mapping[str, Any]) -> str:
    return _core.serialize(message).decode()


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


async def _ended(tasks: Iterable[asyncio.Task[None] | None]) -> None:
    under_way = {task for task in tasks if task is not None}
    if under_way:
        await asyncio.wait(under_way)
