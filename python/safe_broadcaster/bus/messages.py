"""What clients of a `ConnectionManager` may say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, cast
from uuid import UUID

import orjson

__all__ = ["BadMessage", "Said", "parse"]

Kind = Literal["subscribe", "unsubscribe", "ping", "pong"]

MOST_BYTES = 1 << 20
"""Largest message of a client: 10 000 ids of a UUID's length are 400 kB."""
LONGEST_ID = 256
"""Longest id: what is longer is none."""


class BadMessage(ValueError):
    """What a client said is none of it; the text is for the client."""


class Said(NamedTuple):
    """A message of a client."""

    kind: Kind
    ids: list[str]


def parse(message: str | bytes | Mapping[str, Any]) -> Said:
    """Return what a client said.

    Raises:
        BadMessage: It is none of what it may say.

    """
    fields = _fields(message)
    kind = str(fields.get("type"))
    if kind in {"ping", "pong"}:
        return Said(cast("Kind", kind), [])
    if kind in {"subscribe", "unsubscribe"}:
        return Said(cast("Kind", kind), _ids(fields.get("characteristic_ids")))
    raise BadMessage(f"type {kind[:64]!r} is not known; there are subscribe, unsubscribe, ping and pong")


def _fields(message: object) -> Mapping[str, Any]:
    if isinstance(message, (str, bytes)):
        if len(message) > MOST_BYTES:
            raise BadMessage(f"a message has at most {MOST_BYTES} bytes")
        try:
            message = orjson.loads(message)
        except orjson.JSONDecodeError as error:
            raise BadMessage(f"this is no JSON: {error}") from None
    if not isinstance(message, Mapping):
        raise BadMessage("a message is a JSON object with a type")
    return cast("Mapping[str, Any]", message)


def _ids(given: object) -> list[str]:
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise BadMessage("characteristic_ids is to be a list of numbers or texts")
    ids: list[str] = []
    for each in cast("Iterable[object]", given):
        if isinstance(each, bool) or not isinstance(each, (int, str, UUID)) or not 0 < len(str(each)) <= LONGEST_ID:
            raise BadMessage(f"{str(each)[:64]!r} is no id of a characteristic: give a number or a text")
        ids.append(str(each))
    return ids
