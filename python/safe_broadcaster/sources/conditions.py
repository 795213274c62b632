"""When a state is worth an event: it differs from the last one that was sent, and by enough."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Union, cast

import orjson

from safe_broadcaster import _core
from safe_broadcaster.calling import is_async, name_of
from safe_broadcaster.checks import is_number
from safe_broadcaster.exceptions import ConfigError

__all__ = ["Key", "Memory", "Significant", "relative_change"]

Key = Union[str, Callable[[Any], Any], None]  # noqa: UP007 - evaluated, also by Python 3.10
"""What of a state is compared: a function of it, the name of one of its fields, or None for all of it."""

Significant = Union[float, Callable[[Any, Any], object], None]  # noqa: UP007 - evaluated, also by Python 3.10
"""A predicate of the new and the old state, a relative threshold, or None for any change."""


def relative_change(new: float, old: float) -> float:
    """Return ``abs(new - old) / max(abs(old), 1)``, the measure of seed 004: below 1 it is the absolute difference."""
    return abs(new - old) / max(abs(old), 1)


class Seen(NamedTuple):
    """A state, and what is compared of it."""

    state: Any
    copied: Any
    plain: Any
    mark: bytes


class Memory:
    """Remembers the last state that was sent, as it was then: a state that its owner changes in place is noticed."""

    def __init__(self, key: Key, significant: Significant) -> None:
        if not (key is None or isinstance(key, str) or callable(key)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"key={key!r} is not allowed: give a function, the name of a field, or None")
        if not (
            significant is None
            or callable(significant)
            or (is_number(significant) and 0 < cast("float", significant) < math.inf)
        ):
            raise ConfigError(
                f"significant={significant!r} is not allowed: give a relative threshold above 0, as 0.1 for a tenth, "
                "or a function of the new and the old state"
            )
        for setting, function in (("key", key), ("significant", significant)):
            if is_async(function):
                raise ConfigError(
                    f"{setting}={name_of(function)} is not allowed: give a plain function, as nobody awaits it"
                )
        self._key = key
        self._significant = significant
        self._mark: bytes | None = None
        self._plain: Any = None
        self._state: Any = None

    def look(self, state: object) -> Seen:
        """Look at a state, before it is sent.

        Raises:
            EventNotSerializable: JSON cannot carry it.
            KeyError: It has no field of the name that is the key.

        """
        plain = orjson.loads(_core.serialize({"data": self._keyed(state)}))["data"]
        # For a predicate: its owner may change the state while it is sent.
        copied = copy.deepcopy(state) if callable(self._significant) else None
        return Seen(state, copied, plain, orjson.dumps(plain, option=orjson.OPT_SORT_KEYS))

    def is_changed(self, seen: Seen) -> bool:
        """Whether it differs from the last one that was sent."""
        return seen.mark != self._mark

    def is_significant(self, seen: Seen) -> bool:
        """Whether it differs by enough. The first one always does."""
        if self._mark is None or self._significant is None:
            return True
        if callable(self._significant):
            return bool(self._significant(seen.state, self._state))
        return _moved(seen.plain, self._plain, float(self._significant))

    def keep(self, seen: Seen) -> None:
        """Remember that it was sent."""
        self._mark = seen.mark
        if self._significant is not None:
            self._plain = seen.plain
        if callable(self._significant):
            self._state = seen.copied

    def _keyed(self, state: object) -> object:
        if self._key is None:
            return state
        if callable(self._key):
            return self._key(state)
        if isinstance(state, Mapping):
            return cast("Mapping[str, object]", state)[self._key]
        return getattr(state, self._key)


def _moved(new: Any, old: Any, threshold: float) -> bool:
    """Whether a number has moved by more than the threshold, or anything else has changed at all."""
    if is_number(new) and is_number(old):
        return relative_change(new, old) > threshold
    if isinstance(new, dict) and isinstance(old, dict):
        ours, theirs = cast("dict[str, Any]", new), cast("dict[str, Any]", old)
        return ours.keys() != theirs.keys() or any(_moved(ours[name], theirs[name], threshold) for name in ours)
    if isinstance(new, list) and isinstance(old, list):
        mine, yours = cast("list[Any]", new), cast("list[Any]", old)
        return len(mine) != len(yours) or any(_moved(a, b, threshold) for a, b in zip(mine, yours, strict=True))
    return new != old
