"""The Rust core. Users meet it through `SafeBroadcaster`; names with an underscore belong to the package itself."""

from collections.abc import Callable, Coroutine, Mapping
from os import PathLike
from typing import Any, final

from typing_extensions import Self, disjoint_base

from safe_broadcaster.auth import Grant
from safe_broadcaster.config import Durability, EmitterConfig
from safe_broadcaster.hub import HubConfig

__all__ = [
    "AuthDesk",
    "Emitter",
    "Hub",
    "HubClient",
    "HubExchange",
    "HubSession",
    "Mailbox",
    "__version__",
    "_debug_build",
    "matches",
    "serialize",
    "spill_events",
    "spill_requeue",
    "spill_show",
    "spill_verify",
]

__version__: str
_debug_build: bool

def serialize(event: Mapping[str, Any], /) -> bytes:
    """Give the event as JSON.

    Raises:
        EventNotSerializable: It is not a mapping, or holds something that JSON cannot carry.
    """

def matches(pattern: str, kind: str, topic: str = "", /) -> bool:
    """Whether an event with this type and topic matches a pattern.

    Raises `ConfigError` if it is no pattern.
    """

def spill_show(path: str | PathLike[str]) -> bytes:
    """Tell what a spill holds, as a JSON object; its owner may be running in another process.

    This and the following raise `SpillCorrupt` if there is no spill at ``path`` or it cannot be read, and `SpillLocked`
    if a broadcaster of this very process owns it.
    """

def spill_verify(path: str | PathLike[str]) -> list[str]:
    """Check a spill in full; returns what is wrong, at most 100 findings."""

def spill_events(path: str | PathLike[str], parked: bool, after: int, max_bytes: int) -> list[tuple[int, bytes]]:
    """Read events behind ``after``, oldest first, about ``max_bytes`` of them, as ``(key, JSON)``.

    The key of the last one is the next ``after``. Empty at the end.
    """

def spill_requeue(path: str | PathLike[str], seqs: list[int] | None) -> int:
    """Mark parked events to be sent again as new ones, those with these seqs or all; returns how many.

    Raises `ConfigError` for a seq under which nothing is parked; then nothing is marked.
    """

@final
class Mailbox:
    """A queue of letters from Rust with a file descriptor that is readable while there are any.

    Letters are ``(token, value)``: whoever asked for something gave a token with the question.
    """

    def __new__(cls) -> Self: ...
    def fileno(self) -> int:
        """Return the descriptor to watch for readability."""

    def drain(self) -> list[tuple[int, Any]]:
        """Take all letters so far, oldest first; a failure comes as an exception object."""

@disjoint_base
class Emitter:
    """Accepts events and carries them to the peer. `SafeBroadcaster` gives it Python's manners.

    Methods with ``mailbox`` and ``token`` return at once; their answer is a letter. All raise `ForkedProcess` in a
    child that inherited the object over ``fork``.
    """

    def __new__(cls, *_args: Any, **_settings: Any) -> Self: ...
    def safe_emit(self, event: Mapping[str, Any], *, durability: Durability | None = None) -> Coroutine[Any, Any, bool]:
        """Accept an event; awaiting tells the outcome.

        The event is accepted at the call: a forgotten or cancelled await loses nothing, and changing ``event``
        afterwards changes nothing. Only where the spill is full and ``when_full="wait"`` it is accepted by the await.
        At ``"memory"`` and ``"process"`` awaiting does not suspend, live or not, as long as memory has room; only the
        first events, before the spill is open, are awaited until they are in the outbox's file.

        Args:
            event: Any mapping with string keys that orjson can serialise: datetime, UUID, dataclass, enum and numpy
                included; NaN and infinities not.
            durability: When the await ends. None: the broadcaster's own level.

        Returns:
            A coroutine that gives True if the event was accepted while the link was live (at ``"delivered"``: once
            the peer has confirmed it), False if it went to the spill.

        Raises:
            EventNotSerializable: Not a mapping, or something in it is not JSON. Nothing is stored.
            EventTooLarge: More than ``max_event_bytes`` of JSON. Nothing is stored.
            EventRefused: From the await at ``"delivered"``: the peer refused the event, and it is parked.
            SpillFull: The spill is at its bound and ``when_full="raise"``; or, from the await, the event was dropped
                before its delivery.
            SpillCorrupt: From the await: the disk did not keep what the level promises, or ``spill_path`` cannot be
                used (then also SpillLocked). The event is accepted all the same, in memory.
            BroadcasterClosed: After ``stop()``.
            ConfigError: There is no such level; or it needs a file, and the broadcaster is at ``"memory"``.

        """

    def emit_nowait(self, event: Mapping[str, Any], *, durability: Durability | None = None) -> bool:
        """Accept an event from any thread, with no event loop.

        Blocks the calling thread at ``"power"`` for an ``fdatasync``, which all waiting threads share; at
        ``"delivered"`` until the peer has confirmed the event; while memory is at ``outbox_bytes``; and where the
        spill is full and ``when_full="wait"``. Ctrl-C ends the wait, not the delivery. A sync covers all events before,
        so a batch is made durable by its last event.

        Args:
            event: As for `safe_emit`.
            durability: As for `safe_emit`.

        Returns:
            As the await of `safe_emit`.

        Raises:
            EventNotSerializable: As for `safe_emit`.
            EventTooLarge: As for `safe_emit`.
            EventRefused: As for `safe_emit`.
            SpillFull: As for `safe_emit`; also where waiting for room on the thread of an event loop that serves a
                duck-typed ``ws_client`` would wait for itself.
            BroadcasterClosed: After ``stop()``.
            ConfigError: There is no such level; or ``"delivered"`` on the thread just described.

        """

    def get_stats(self) -> dict[str, Any]:
        """Return counters and states; reads memory only, so it is cheap enough for every tick.

        Returns:
            ``emit_count``, ``spill_count``, ``flush_count``: events accepted live, spilled, and confirmed after a
            spill. ``current_spill_depth``: spilled events not confirmed. ``ready``, ``ws_available``: the link was up
            ever, is up now. ``last_seq``, ``acked_seq``: newest seq given, and confirmed without holes. ``in_flight``,
            ``in_flight_bytes``: sent and not confirmed. ``outbox_bytes``, ``spill_bytes``: bytes in memory, on disk.
            ``oldest_unacked_age``: seconds. ``dropped``: given up by policy or age. ``parked``: refused by the
            peer, and kept aside in the spill. ``refused``: `SpillFull` raised.
            ``rejected``: events that can never be sent. ``breaker``: ``closed``, ``open`` or ``half_open``.
            ``degraded``: the disk refuses writes. ``reconnects``, ``last_error``. ``fsync_p99``: seconds, or None.
            ``emit_success_rate_1m``: 0 to 1. ``flush_latency_last``: seconds, or None. ``flush_remaining``,
            ``flush_rate_current``: events that the flush under way has yet to bring, events per second that it brought
            lately; 0 without one. ``flush_window_bytes``: most bytes that may be unconfirmed at once. ``emitter``,
            ``epoch``: the identity, None until the spill is open.

        """

    @property
    def emit_count(self) -> int:
        """Events accepted while the link was live."""

    @property
    def spill_count(self) -> int:
        """Events spilled, on arrival or with a lost link."""

    @property
    def flush_count(self) -> int:
        """Spilled events that the peer has confirmed."""

    @property
    def connected(self) -> bool:
        """Whether the link is live now."""

    @property
    def _is_ready(self) -> bool:
        """Whether the link was ever live."""

    @property
    def _depth(self) -> int:
        """Spilled events not confirmed."""

    def _open(
        self,
        target: object,
        spill_path: str | PathLike[str],
        settings: EmitterConfig,
        probe: Callable[[], bool] | None,
    ) -> None:
        """Take the settings; called once by ``SafeBroadcaster.__init__``.

        Args:
            target: A URL, a hub's client, or None for a peer that is served through the mailbox.
            spill_path: The file of the spill. Nothing is opened yet.
            settings: All settings.
            probe: Tells whether a peer can send; asked before each event.

        Raises:
            ConfigError: A setting has a value that is not allowed.

        """

    def _start(self, mailbox: Mailbox, token: int) -> None:
        """Open the spill and connect; the letter is None when the link is live."""

    def _await_live(self, mailbox: Mailbox, token: int) -> None:
        """Ask for the letter None when the link is live."""

    def _await_ready(self, mailbox: Mailbox, token: int) -> None:
        """Ask for the letter None when the link was ever live."""

    def _await_level(self, mailbox: Mailbox, token: int, level: str, seq: int, provisional: bool) -> None:
        """Ask for the letter None when the event with this seq is confirmed."""

    def _await_synced(self, mailbox: Mailbox, token: int, first: int, last: int) -> None:
        """Ask for the letter None when all events with these seqs survive power loss, or for an exception."""

    def _when_room(self, mailbox: Mailbox, token: int) -> None:
        """Ask for the letter None when the outbox has room."""

    def _drain(self, mailbox: Mailbox, token: int) -> None:
        """Ask for the letter None when everything accepted so far is confirmed."""

    def _flush(self, mailbox: Mailbox, token: int) -> None:
        """Flush; the letter is ``(flushed, failed, remaining)``."""

    def _stop(self, mailbox: Mailbox, token: int, drain: float) -> None:
        """Stop after at most ``drain`` seconds of sending; the letter is None when everything is closed."""

    def _stop_blocking(self, drain: float) -> None:
        """Stop, and wait for the end in this thread."""

    def _report_to(self, mailbox: Mailbox, token: int) -> None:
        """Send reports as letters ``(JSON without timestamp, Unix time in seconds)`` from now on."""

    def _serve_peer(self, mailbox: Mailbox, token: int) -> None:
        """Send requests for a duck-typed client as letters.

        They are ``("connect",)``, ``("send", first seq, list of events as JSON)`` and ``("close",)``.
        """

    def _peer_up(self) -> None:
        """Tell that the client has connected."""

    def _peer_sent(self, upto: int) -> None:
        """Tell that the client has sent everything up to this seq."""

    def _peer_failed(self, sent: int, why: str) -> None:
        """Tell that sending failed after everything up to ``sent``."""

    def _peer_down(self, why: str) -> None:
        """Tell that the client cannot send."""

    def _peek(self, after: int, max_bytes: int) -> list[tuple[int, bytes]]:
        """Read spilled events after a seq as ``(seq, JSON)``, about ``max_bytes`` of them; blocks for the disk."""

@final
class Hub:
    """A hub that can be started, stopped and started again; see `safe_broadcaster.hub.EventBroadcaster`."""

    def __new__(cls) -> Hub: ...
    def start(self, config: HubConfig, auth_desk: AuthDesk | None = None) -> int:
        """Start with these settings; returns the port, which accepts connections from now on.

        The desk leads to ``auth`` if that is a function.

        Raises `ConfigError` for a setting that is not allowed, `ConnectRefused` for an address that cannot be used,
        `BusUnavailable` if Redis cannot be reached, which takes up to ``bus_timeout``, or lets nobody in;
        `BroadcasterClosed` if it is stopped meanwhile.
        """

    def abort_start(self) -> None:
        """End a start for which nobody waits any more, or stop the hub if it has started meanwhile."""

    def stop(self, mailbox: Mailbox, token: int) -> None:
        """Begin to stop; a letter under ``token`` (None) tells the end of it."""

    def publish(self, json: bytes) -> tuple[int, int]:
        """Publish an event given as JSON; returns its offset and the number of sessions, or hubs, that it reached."""

    def publish_later(self, mailbox: Mailbox, token: int, json: bytes) -> None:
        """Publish without waiting for disk or bus; a letter for ``token`` brings what `publish` gives, or an error."""

    def stats(self) -> bytes | None:
        """The numbers of the hub as JSON; None before the first start."""

    def is_listening(self) -> bool:
        """Whether new connections are accepted."""

    def admit(
        self, mailbox: Mailbox, token: int, path: str, headers: list[tuple[bytes, bytes]]
    ) -> HubSession | tuple[int, str]:
        """Let a client in whose socket an ASGI server holds; gives HTTP status and reason if it is refused.

        A letter under ``token`` (None) says that there is something to take, or room to feed again.
        """

    def answer(
        self, mailbox: Mailbox, token: int, method: str, target: str, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> HubExchange:
        """Answer an HTTP request; a letter under ``token`` says that there is something to take."""

    def listen_again(self) -> None:
        """Take the port anew; those who are connected stay. Blocks for up to a second.

        Raises `ConnectRefused` if the port cannot be had, `BroadcasterClosed` after a stop.
        """

    def tell(self, trouble: str | None, circuit: str, /) -> None:
        """Tell subscribers what is the matter, or with None that it is over; ``circuit`` is the breaker's state."""

    def frames_since(self, offset: int, most: int, replay: bool) -> list[bytes]:
        """Read the log after an offset: at most so many frames, oldest first."""

    def clients(self, most: int) -> bytes:
        """At most so many subscribers as a JSON array, those that are furthest behind first."""

    def client(self) -> HubClient:
        """A client for emitters of this process; it stays valid over restarts."""

@final
class AuthDesk:
    """Where questions about tokens wait for an event loop; see `safe_broadcaster.auth`."""

    def __new__(cls) -> AuthDesk: ...
    def serve(self, mailbox: Mailbox, token: int) -> None:
        """Have questions ``(number, token)`` come as letters under ``token``."""

    def answer(self, number: int, grant: Grant | None) -> None:
        """Answer a question; raises `ConfigError` for a grant with a wrong field."""

    def fail(self, number: int) -> None:
        """Say that a question cannot be answered: the token is refused."""

@final
class HubClient:
    """The way to a hub of the same process, without a socket. Given to `SafeBroadcaster`, not used by hand."""

@final
class HubSession:
    """A client whose socket an ASGI server holds."""

    @property
    def id(self) -> str:
        """Name in the hub's numbers."""

    @property
    def subprotocol(self) -> str | None:
        """What to answer the handshake with."""

    def feed_text(self, text: str) -> bool:
        """Hand over a text message; False if no more should come before a letter."""

    def feed_binary(self, data: bytes) -> bool:
        """Hand over a binary message; False if no more should come before a letter."""

    def has_room(self) -> bool:
        """Whether more may be fed; if not, a letter says when."""

    def take(self) -> list[str | bytes | tuple[int, str]] | None:
        """Take what is to be sent, and say that what was taken before has been.

        Texts, binary messages, and as the last one ``(code, reason)`` of the close. Empty if there is nothing yet: a
        letter says when there is. None if nothing will ever come again.
        """

    def is_over(self) -> bool:
        """Whether the session has ended."""

    def hang_up(self) -> None:
        """Say that the client is gone."""

    def record_ack(self, sequence: int) -> None:
        """Note an ack that came in another way than by a frame."""

    def preset(self, patterns: list[str]) -> None:
        """Choose events on the client's behalf, until it subscribes by itself."""

@final
class HubExchange:
    """The answer to an HTTP request."""

    def take(self) -> list[bytes | tuple[int, list[tuple[bytes, bytes]]]] | None:
        """Take what there is: first ``(status, header fields)``, then the body in pieces.

        Empty if there is nothing yet: a letter says when there is. None at the end.
        """
