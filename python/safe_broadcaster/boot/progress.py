"""What a boot sequence shows while it runs, and tells when it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BootProgress", "BootReport", "told"]


class BootProgress(NamedTuple):
    """What has just happened to a step. ``str()`` gives a line to show."""

    step: str
    """Its name."""
    state: Literal["starting", "ready", "failed", "undone", "undo failed"]
    """What happened."""
    number: int
    """How many steps have begun, this one included."""
    total: int
    """How many there are."""
    seconds: float
    """How long it took; 0 for ``starting``."""
    error: BaseException | None = None
    """What was raised, where something failed."""

    def __str__(self) -> str:
        took = f" after {self.seconds:.2f} s" if self.state != "starting" else ""
        why = f": {told(self.error)}" if self.error is not None else ""
        return f"[{self.number}/{self.total}] {self.step}: {self.state}{took}{why}"


class BootReport(NamedTuple):
    """What a start took."""

    seconds: float
    """From the first step's beginning until the last one was ready."""
    took: Mapping[str, float]
    """Seconds of each step, its wait for readiness included, in the order in which they were ready."""


def told(error: BaseException) -> str:
    """Return what was raised, for people."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
