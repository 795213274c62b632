"""The wall clock, and how it is written."""

from __future__ import annotations

from datetime import datetime, timezone

__all__ = ["utc_now", "utc_text"]


def utc_now() -> datetime:
    """Return the time of the wall clock, with its zone."""
    return datetime.now(timezone.utc)


def utc_text(moment: datetime | None) -> str | None:
    """Return a moment as ``2024-01-03T10:30:45Z``, and None for none."""
    return None if moment is None else moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
