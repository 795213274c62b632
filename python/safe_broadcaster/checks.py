"""Refusing arguments that make no sense, each by its name, before anything runs with them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "check_callable",
    "check_choice",
    "check_count",
    "check_number",
    "check_seconds",
    "check_timeout",
    "is_number",
]


def is_number(value: object) -> bool:
    """Whether it is a number, which True is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_callable(setting: str, function: object) -> None:
    """Raise `ConfigError` for what cannot be called."""
    if not callable(function):
        raise ConfigError(f"{setting}={function!r} is not allowed: give a function, async or not")


def check_choice(setting: str, value: object, allowed: Sequence[object]) -> None:
    """Raise `ConfigError` for what is none of these."""
    if value not in allowed:
        raise ConfigError(f"{setting}={value!r} is not allowed: give one of {', '.join(map(repr, allowed))}")


def check_count(setting: str, value: object) -> None:
    """Raise `ConfigError` for what is no whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{setting}={value!r} is not allowed: give a whole number, at least 1")


def check_number(setting: str, value: Any, least: float, most: float = math.inf) -> None:
    """Raise `ConfigError` for what is no number between these two."""
    if not (is_number(value) and least <= value <= most):
        bounds = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
        raise ConfigError(f"{setting}={value!r} is not allowed: give a number, {bounds}")


def check_seconds(setting: str, value: Any) -> None:
    """Raise `ConfigError` for what is no time above 0 that ends."""
    if not (is_number(value) and 0 < value < math.inf):
        raise ConfigError(f"{setting}={value!r} is not allowed: give seconds, more than 0")


def check_timeout(setting: str, value: Any) -> None:
    """Raise `ConfigError` for what is neither a time above 0 nor None."""
    if value is not None and not (is_number(value) and value > 0):
        raise ConfigError(f"{setting}={value!r} is not allowed: give seconds above 0, or None for no limit")
