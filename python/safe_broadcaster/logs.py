"""Log records as events, so that a dashboard can show them.

::

    logging.getLogger().addHandler(SafeBroadcasterHandler(broadcaster))

This package itself logs under ``safe_broadcaster`` and installs no handler.
"""

from __future__ import annotations

import logging
import threading
import traceback
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

from safe_broadcaster import _core
from safe_broadcaster.exceptions import ConfigError, EventNotSerializable, EventTooLarge

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SafeBroadcasterHandler"]

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; anything else was given as ``extra``."""

_SHORT = 1000
"""Characters that are left of a message for which an event has no room."""


class EmitsNow(Protocol):
    """What a handler needs of a broadcaster; `SafeBroadcaster` has it."""

    def emit_nowait(self, event: Mapping[str, Any], /, *, durability: Any = None) -> bool:
        """Accept an event, on any thread."""
        ...


class SafeBroadcasterHandler(logging.Handler):
    """Emits each record as ``{"type": "log.<level>", "topic": "log/<logger>", "content": {…}, "timestamp": …}``.

    The content has ``logger``, ``level``, ``message``, ``where`` (file, line and function), ``process``, ``thread``,
    and ``exception`` (the traceback), ``stack`` (of ``stack_info``) and ``extra`` where there are some. Values of
    ``extra`` that JSON cannot carry are sent as their ``repr``, and what of a text is no Unicode (file names may have
    such) is escaped. Records may come from any thread, and are accepted at the level ``memory``: nobody waits for the
    network, nor for the disk unless memory is full.

    Records of this package are left out unless ``own`` is set: with the link down, each record about that would be an
    event more that waits for it.

    Args:
        broadcaster: A `SafeBroadcaster`, or whatever has ``emit_nowait(event, durability=…)``.
        level: Records below it are left out. Default: none.
        own: Whether records of ``safe_broadcaster.*`` are emitted too. Default: no, see above.

    Raises:
        ConfigError: The broadcaster has no ``emit_nowait``.

    """

    def __init__(self, broadcaster: EmitsNow, level: int | str = logging.NOTSET, *, own: bool = False) -> None:
        if not callable(getattr(broadcaster, "emit_nowait", None)):
            raise ConfigError(f"broadcaster={broadcaster!r} is not allowed: give an object with emit_nowait(event)")
        super().__init__(level)
        self._broadcaster = broadcaster
        self._own = own
        self._busy = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        """Emit a record; what goes wrong with that is `logging.Handler.handleError`'s affair, as in any handler."""
        if self._is_ours(record) and not self._own:
            return
        if getattr(self._busy, "emitting", False):  # a record about the emitting of a record
            return
        self._busy.emitting = True
        try:
            self._emit(_event(record, self.format(record)))
        except Exception:  # noqa: BLE001 - a program must not fail because it logs
            self.handleError(record)
        finally:
            self._busy.emitting = False

    def _emit(self, event: dict[str, Any]) -> None:
        for mended in (_plain, _short):
            try:
                self._broadcaster.emit_nowait(event, durability="memory")
            except (EventNotSerializable, EventTooLarge):  # noqa: PERF203 - one event, twice at most
                event = mended(event)
            else:
                return
        self._broadcaster.emit_nowait(event, durability="memory")

    @staticmethod
    def _is_ours(record: logging.LogRecord) -> bool:
        return record.name == "safe_broadcaster" or record.name.startswith("safe_broadcaster.")

    def format(self, record: logging.LogRecord) -> str:
        """Return the message, in the form of the formatter if one was set; the traceback goes elsewhere."""
        return record.getMessage() if self.formatter is None else self.formatter.format(record)


def _event(record: logging.LogRecord, message: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "logger": record.name,
        "level": record.levelname,
        "message": message,
        "where": f"{record.pathname}:{record.lineno} {record.funcName}",
        "process": record.process,
        "thread": record.threadName,
    }
    if record.exc_info is not None and record.exc_info[0] is not None:
        content["exception"] = "".join(traceback.format_exception(*record.exc_info))
    if record.stack_info:
        content["stack"] = record.stack_info
    if extra := {name: value for name, value in vars(record).items() if name not in _PLAIN}:
        content["extra"] = extra
    return {
        "type": f"log.{record.levelname.lower()}",
        "topic": "log/" + record.name.replace(".", "/"),
        "content": content,
        "timestamp": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
    }


def _plain(event: dict[str, Any]) -> dict[str, Any]:
    """Return the event with nothing in it that JSON cannot carry."""
    content = {name: _value(value) for name, value in event["content"].items() if name != "extra"}
    if extra := event["content"].get("extra"):
        content["extra"] = {name: _value(value) for name, value in extra.items()}
    return {name: _value(value) for name, value in event.items()} | {"content": content}


def _value(value: object) -> object:
    try:
        _core.serialize({"value": value})
    except EventNotSerializable:
        text = value if isinstance(value, str) else repr(value)
        return text.encode(errors="backslashreplace").decode()
    return value


def _short(event: dict[str, Any]) -> dict[str, Any]:
    """Return the event without what may be long."""
    content = {name: value for name, value in event["content"].items() if name not in {"extra", "exception", "stack"}}
    content["message"] = content["message"][:_SHORT] + "…"
    return {**event, "content": content}
